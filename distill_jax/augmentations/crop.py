"""Random crops, resized to the size of the image."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from distill_jax.augmentations import Example
from distill_jax.augmentations._pixels import PIXELS, to_pillow, to_pixels
from distill_jax.data.image_files import pillow
from distill_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """A box of random area and shape, anywhere, resized to the whole (arXiv:1409.4842, section 6).

  Attributes:
    area: the least part of the image's area that the box has; 1: all, and nothing is resized.
    ratio: the box is at most so many times wider than high, or higher than wide.
    pad: black pixels on every side, within which the box lies.
  """

  area: float = 1.0
  ratio: float = 1.0
  pad: int = 0

  def __post_init__(self):
    if not 0 < self.area <= 1 or self.ratio < 1 or self.pad < 0:
      raise InputError(
        f"area is {self.area}, ratio {self.ratio} and pad {self.pad}; area is above 0 and at most "
        "1, ratio at least 1, pad at least 0"
      )

  def __call__(
    self, rng: np.random.Generator, example: Example, other: Callable[[], Example]
  ) -> Example:
    del other
    pixels = example[PIXELS]
    H, W = pixels.shape[:2]
    pad = self.pad
    padded = np.zeros((H + 2 * pad, W + 2 * pad, pixels.shape[2]), np.uint8)
    padded[pad : pad + H, pad : pad + W] = pixels  # np.pad takes as long as all the rest
    area, max_log_ratio = rng.uniform(self.area, 1), math.log(self.ratio)
    ratio = math.exp(rng.uniform(-max_log_ratio, max_log_ratio))
    h = min(round(H * math.sqrt(area / ratio)), padded.shape[0])
    w = min(round(W * math.sqrt(area * ratio)), padded.shape[1])
    y, x = (int(rng.integers(0, n + 1)) for n in (padded.shape[0] - h, padded.shape[1] - w))
    part = padded[y : y + h, x : x + w]
    if (h, w) != (H, W):
      part = to_pixels(to_pillow(part).resize((W, H), pillow().Resampling.BILINEAR))
    return example | {PIXELS: part}
