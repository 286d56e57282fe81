"""The image in a mirror, left and right exchanged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from distill_jax.augmentations._pixels import PIXELS, Example, probability


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """With probability p."""

  p: float = 0.5

  def __post_init__(self):
    probability("p", self.p)

  def __call__(
    self, rng: np.random.Generator, example: Example, other: Callable[[], Example]
  ) -> Example:
    del other
    return example | {PIXELS: example[PIXELS][:, ::-1]} if rng.random() < self.p else example
