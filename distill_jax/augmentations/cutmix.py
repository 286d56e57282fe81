"""CutMix: a box of one image set into another (arXiv:1905.04899)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from distill_jax.augmentations import Example
from distill_jax.augmentations._pixels import PIXELS, check_probability, with_drawn_label
from distill_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """The box has 1 - lambda of the area, lambda of Beta(alpha, alpha), its middle is anywhere.

  It is cut off at the edge; the label is drawn by what is seen of each image.

  Attributes:
    p: the probability that anything is done.
  """

  alpha: float = 1.0
  p: float = 1.0

  def __post_init__(self):
    check_probability("p", self.p)
    if self.alpha <= 0:
      raise InputError(f"alpha is {self.alpha}; it is above 0")

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
  """Returns (first, past the last) of `part` of n pixels around a random middle."""
  size, middle = round(n * part), int(rng.integers(0, n))
  first = middle - size // 2
  return max(first, 0), min(first + size, n)
