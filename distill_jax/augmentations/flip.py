"""Horizontal flips."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from distill_jax.augmentations import Example
from distill_jax.augmentations._pixels import PIXELS, check_probability


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """Flips an image left to right with probability p."""

  p: float = 0.5
  """Probability that an image is flipped."""

  def __post_init__(self):
    check_probability("p", self.p)

  def __call__(
    self, rng: np.random.Generator, example: Example, other: Callable[[], Example]
  ) -> Example:
    del other
    return example | {PIXELS: example[PIXELS][:, ::-1]} if rng.random() < self.p else example
