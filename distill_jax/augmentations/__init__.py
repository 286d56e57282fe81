"""Augmentations of training examples. One augmentation a file; the folder is the registry.

An augmentation is a module with a frozen dataclass `Augmentation`, of the type below, whose fields
are its config keys. It is a function of its arguments alone, so that a view is made again bit for
bit from (seed, row): teacher and student see the same one (arXiv:2106.05237).

Images are `pixels_WWM`, uint8 [height, width, channels], before they are normalised. Where two
images are mixed the label is drawn, a's with a's share: the cross-entropy is then that of the mixed
labels in expectation, and labels stay whole numbers.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

Example = dict[str, np.ndarray]


class Augmentation(Protocol):
  """Changes an example, at random."""

  def __call__(
    self, rng: np.random.Generator, example: Example, other: Callable[[], Example]
  ) -> Example:
    """Returns a new example.

    Args:
      rng: the source of all randomness.
      example: its arrays, by name.
      other: draws another example of the same source, by `rng`.
    """
