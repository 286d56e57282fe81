"""RandAugment (arXiv:1909.13719): several random changes of equal strength."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from distill_jax.augmentations import Example, _pixels
from distill_jax.augmentations._pixels import PIXELS
from distill_jax.errors import bad_value
from distill_jax.runtime import extras


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """Applies `n` randomly chosen changes of CHANGES to an image, one after another."""

  n: int = 2
  """Number of changes."""
  magnitude: float = 9.0
  """Strength of the changes, from 0 to 10, as in the paper."""
  fill: int = 0
  """Grey level, from 0 to 255, of points outside the image."""

  def __post_init__(self):
    if self.n < 1:
      raise bad_value("n", self.n, "at least 1", "Raise it")
    if not 0 <= self.magnitude <= 10:
      raise bad_value("magnitude", self.magnitude, "a number from 0 to 10", "Correct it")
    if not 0 <= self.fill <= 255:
      raise bad_value("fill", self.fill, "a grey level from 0 to 255", "Correct it")

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
    pixels_WWM: The image, uint8 [height, width, channels].
    name: One of CHANGES.
    strength: Strength from -1 to 1. The sign is ignored by changes with only one direction.
    fill: Grey level of points outside the image.
  """
  if name in WARPS:
    H, W = pixels_WWM.shape[:2]
    return _pixels.warped(pixels_WWM, WARPS[name](strength, H, W), fill)
  return _pixels.to_pixels(TONES[name](_pixels.to_pillow(pixels_WWM), strength))


def _rotate(s: float, H: int, W: int) -> np.ndarray:
  """Returns a counter-clockwise rotation by 30 * s degrees."""
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
def _pillow(module: str) -> Any:
  """Returns a module of Pillow, "ImageOps" or "ImageEnhance"."""
  with extras.needed("images"):
    return importlib.import_module(f"PIL.{module}")


def _enhanced(image: Any, kind: str, s: float) -> Any:
  """Returns an image with a property of PIL.ImageEnhance, e.g. "Color", multiplied by 1 + 0.9 s."""
  return getattr(_pillow("ImageEnhance"), kind)(image).enhance(1 + 0.9 * s)


# Changes of grey levels and colours: functions of a Pillow image and a strength.
TONES: dict[str, Callable[[Any, float], Any]] = {
  "identity": lambda image, s: image,
  "auto_contrast": lambda image, s: _pillow("ImageOps").autocontrast(image),
  "equalize": lambda image, s: _pillow("ImageOps").equalize(image),
  "posterize": lambda image, s: _pillow("ImageOps").posterize(image, 8 - round(4 * abs(s))),
  "solarize": lambda image, s: _pillow("ImageOps").solarize(image, round(256 * (1 - abs(s)))),
  "brightness": lambda image, s: _enhanced(image, "Brightness", s),
  "contrast": lambda image, s: _enhanced(image, "Contrast", s),
  "sharpness": lambda image, s: _enhanced(image, "Sharpness", s),
  "colour": lambda image, s: _enhanced(image, "Color", s),
}
CHANGES = (*WARPS, *TONES)
