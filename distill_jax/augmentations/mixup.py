"""MixUp: weighted sums of two images (arXiv:1710.09412)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from distill_jax.augmentations import Example
from distill_jax.augmentations._pixels import PIXELS, with_drawn_label
from distill_jax.errors import bad_value


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """Mixes two images: lambda a + (1 - lambda) b, with lambda drawn from Beta(alpha, alpha).

  The label is that of a with probability lambda, else that of b.
  """

  alpha: float = 0.2
  """Parameter of the Beta distribution, above 0."""

  def __post_init__(self):
    if self.alpha <= 0:
      raise bad_value("alpha", self.alpha, "a number above 0", "Raise it")

  def __call__(
    self, rng: np.random.Generator, example: Example, other: Callable[[], Example]
  ) -> Example:
    b, share = other(), rng.beta(self.alpha, self.alpha)
    mixed = share * example[PIXELS].astype(np.float32) + (1 - share) * b[PIXELS]
    return with_drawn_label(rng, example | {PIXELS: np.rint(mixed).astype(np.uint8)}, b, share)
