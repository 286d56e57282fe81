"""Augmentations of training examples. Each augmentation is one file; the folder is the registry.

An augmentation is a module with a frozen dataclass `Augmentation` that follows the protocol below
and whose fields are its config keys. It depends only on its arguments, so that an augmented view
can be regenerated bit for bit from (seed, row): teacher and student see the same view
(arXiv:2106.05237).

Images are `pixels_WWM`, uint8 [height, width, channels], before normalisation. An augmentation
that mixes two images draws the label from one of them, with probability equal to that image's
share. The expected cross-entropy is then that of the mixed labels, and labels stay integers.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

Example = dict[str, np.ndarray]


class Augmentation(Protocol):
  """A random change of an example."""

  def __call__(
    self, rng: np.random.Generator, example: Example, other: Callable[[], Example]
  ) -> Example:
    """Returns a new example.

    Args:
      rng: The source of all randomness.
      example: Arrays of the example, by name.
      other: Draws another example of the same source with `rng`.
    """
