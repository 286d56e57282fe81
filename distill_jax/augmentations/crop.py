"""Random crops that are resized to the size of the image."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from distill_jax.augmentations import Example
from distill_jax.augmentations._pixels import PIXELS, to_pillow, to_pixels
from distill_jax.data.image_files import pillow
from distill_jax.errors import bad_value


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """Crops a box of random size, shape and place, and resizes it to the size of the image.

  See arXiv:1409.4842, section 6.
  """

  area: float = 1.0
  """Smallest area of the box as a fraction of the image's area; 1 for no resizing."""
  ratio: float = 1.0
  """Largest aspect ratio of the box, long side to short side; 1 for the aspect of the image."""
  pad: int = 0
  """Number of black pixels added on every side before cropping."""

  def __post_init__(self):
    if not 0 < self.area <= 1:
      raise bad_value("area", self.area, "a number above 0 and at most 1", "Correct it")
    if self.ratio < 1:
      raise bad_value("ratio", self.ratio, "at least 1", "Raise it")
    if self.pad < 0:
      raise bad_value("pad", self.pad, "at least 0", "Raise it")

  def __call__(
    self, rng: np.random.Generator, example: Example, other: Callable[[], Example]
  ) -> Example:
    del other
    pixels = example[PIXELS]
    H, W = pixels.shape[:2]
    pad = self.pad
    padded = np.zeros((H + 2 * pad, W + 2 * pad, pixels.shape[2]), np.uint8)
    padded[pad : pad + H, pad : pad + W] = pixels  # np.pad would take as long as everything else
    area, max_log_ratio = rng.uniform(self.area, 1), math.log(self.ratio)
    ratio = math.exp(rng.uniform(-max_log_ratio, max_log_ratio))
    h = min(round(H * math.sqrt(area / ratio)), padded.shape[0])
    w = min(round(W * math.sqrt(area * ratio)), padded.shape[1])
    y, x = (int(rng.integers(0, n + 1)) for n in (padded.shape[0] - h, padded.shape[1] - w))
    part = padded[y : y + h, x : x + w]
    if (h, w) != (H, W):
      part = to_pixels(to_pillow(part).resize((W, H), pillow().Resampling.BILINEAR))
    return example | {PIXELS: part}
