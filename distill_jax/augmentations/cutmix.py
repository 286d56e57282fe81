"""CutMix: a box of one image pasted into another (arXiv:1905.04899)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from distill_jax.augmentations import Example
from distill_jax.augmentations._pixels import PIXELS, check_probability, with_drawn_label
from distill_jax.errors import bad_value


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """Pastes a box of another image into an image.

  The box has a fraction 1 - lambda of the area, with lambda drawn from Beta(alpha, alpha), and a
  random centre; it is cut off at the edge. The label is drawn in proportion to the visible areas.
  """

  alpha: float = 1.0
  """Parameter of the Beta distribution, above 0."""
  p: float = 1.0
  """Probability that an image is changed."""

  def __post_init__(self):
    check_probability("p", self.p)
    if self.alpha <= 0:
      raise bad_value("alpha", self.alpha, "a number above 0", "Raise it")

  def __call__(
    self, rng: np.random.Generator, example: Example, other: Callable[[], Example]
  ) -> Example:
    if rng.random() >= self.p:
      return example
    b, share = other(), rng.beta(self.alpha, self.alpha)
    H, W = example[PIXELS].shape[:2]
    (top, bottom), (left, right) = (_span(rng, n, math.sqrt(1 - share)) for n in (H, W))
    pixels = example[PIXELS].copy()
    pixels[top:bottom, left:right] = b[PIXELS][top:bottom, left:right]
    share = 1 - (bottom - top) * (right - left) / (H * W)
    return with_drawn_label(rng, example | {PIXELS: pixels}, b, share)


def _span(rng: np.random.Generator, n: int, part: float) -> tuple[int, int]:
  """Returns the range (first, end) of a fraction `part` of n pixels around a random centre."""
  size, middle = round(n * part), int(rng.integers(0, n))
  first = middle - size // 2
  return max(first, 0), min(first + size, n)
