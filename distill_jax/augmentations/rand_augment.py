"""RandAugment (arXiv:1909.13719): a few random changes, all of one strength."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from distill_jax.augmentations import Example, _pixels
from distill_jax.augmentations._pixels import PIXELS
from distill_jax.errors import InputError
from distill_jax.runtime import extras


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """`n` changes out of CHANGES, each drawn anew, one after another.

  Attributes:
    magnitude: their strength, from 0 to 10, as in the paper.
    fill: the grey level that shows from outside the image.
  """

  n: int = 2
  magnitude: float = 9.0
  fill: int = 0

  def __post_init__(self):
    if self.n < 1 or not 0 <= self.magnitude <= 10 or not 0 <= self.fill <= 255:
      raise InputError(
        f"n is {self.n}, magnitude {self.magnitude} and fill {self.fill}; n is at least 1, "
        "magnitude from 0 to 10, fill from 0 to 255"
      )

  def __call__(
    self, rng: np.random.Generator, example: Example, other: Callable[[], Example]
  ) -> Example:
    del other
    pixels = example[PIXELS]
    for _ in range(self.n):
      name, side = CHANGES[rng.integers(len(CHANGES))], rng.choice((-1, 1))
      pixels = changed(pixels, name, side * self.magnitude / 10, self.fill)
    return example | {PIXELS: pixels}


def changed(pixels_WWM: np.ndarray, name: str, strength: float, fill: int = 0) -> np.ndarray:
  """Returns an image after one of CHANGES.

  Args:
    pixels_WWM: the image.
    name: one of CHANGES.
    strength: from -1 to 1; the sign does nothing where a change has but one direction.
    fill: the grey level that shows from outside the image.
  """
  if name in WARPS:
    H, W = pixels_WWM.shape[:2]
    return _pixels.warped(pixels_WWM, WARPS[name](strength, H, W), fill)
  return _pixels.to_pixels(_tones()[name](_pixels.to_pillow(pixels_WWM), strength))


def _rotate(s: float, H: int, W: int) -> np.ndarray:
  """Returns a rotation of the image counter-clockwise, by up to 30 degrees."""
  a = math.radians(30 * s)
  return np.array([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0]])


WARPS: dict[str, Callable[[float, int, int], np.ndarray]] = {
  "rotate": _rotate,
  "shear_x": lambda s, H, W: np.array([[1, 0.3 * s, 0], [0, 1, 0]]),
  "shear_y": lambda s, H, W: np.array([[1, 0, 0], [0.3 * s, 1, 0]]),
  "translate_x": lambda s, H, W: np.array([[1, 0, 0.3 * s * W], [0, 1, 0]]),
  "translate_y": lambda s, H, W: np.array([[1, 0, 0], [0, 1, 0.3 * s * H]]),
}


@functools.cache
def _tones() -> dict[str, Callable[[Any, float], Any]]:
  """Returns the changes of grey levels and colours, functions of a Pillow image and a strength."""
  with extras.needed("images"):
    from PIL import ImageEnhance, ImageOps
  return {
    "identity": lambda image, s: image,
    "auto_contrast": lambda image, s: ImageOps.autocontrast(image),
    "equalize": lambda image, s: ImageOps.equalize(image),
    "posterize": lambda image, s: ImageOps.posterize(image, 8 - round(4 * abs(s))),
    "solarize": lambda image, s: ImageOps.solarize(image, round(256 * (1 - abs(s)))),
    "brightness": lambda image, s: ImageEnhance.Brightness(image).enhance(1 + 0.9 * s),
    "contrast": lambda image, s: ImageEnhance.Contrast(image).enhance(1 + 0.9 * s),
    "sharpness": lambda image, s: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * s),
    "colour": lambda image, s: ImageEnhance.Color(image).enhance(1 + 0.9 * s),
  }


TONES = (
  "identity",
  "auto_contrast",
  "equalize",
  "posterize",
  "solarize",
  "brightness",
  "contrast",
  "sharpness",
  "colour",
)
CHANGES = (*WARPS, *TONES)
