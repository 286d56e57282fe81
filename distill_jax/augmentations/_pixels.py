"""Image operations that augmentations share: conversion to and from Pillow, warping, mixing."""

from __future__ import annotations

from typing import Any

import numpy as np

from distill_jax.augmentations import Example
from distill_jax.data.image_files import pillow
from distill_jax.errors import InputError

PIXELS, LABELS = "pixels_WWM", ("labels_T", "mask_T")


def check_probability(name: str, p: float) -> None:
  """Refuses a number that is not a probability."""
  if not 0 <= p <= 1:
    raise InputError(f"{name} is {p}; a probability, from 0 to 1, was expected")


def to_pillow(pixels_WWM: np.ndarray) -> Any:
  """Returns an image of one channel, grey, or of three."""
  return pillow().fromarray(pixels_WWM[..., 0] if pixels_WWM.shape[-1] == 1 else pixels_WWM)


def to_pixels(image: Any) -> np.ndarray:
  """Returns uint8 [height, width, 1 or 3]."""
  pixels = np.asarray(image)
  return pixels[..., None] if pixels.ndim == 2 else pixels


def warped(pixels_WWM: np.ndarray, matrix: np.ndarray, fill: int = 0) -> np.ndarray:
  """Returns the image whose point (x, y) shows what was at `matrix` @ (x, y, 1).

  Args:
    pixels_WWM: the image; points count from its centre.
    matrix: float [2, 3], of x to the right and y downwards, in pixels.
    fill: the grey level that shows from outside the image.
  """
  image = to_pillow(pixels_WWM)
  (a, b, c), (d, e, f) = matrix
  cx, cy = image.width / 2, image.height / 2  # Pillow counts from the corner
  data = (a, b, c + cx - a * cx - b * cy, d, e, f + cy - d * cx - e * cy)
  grey = image.mode == "L"
  warped_image = image.transform(
    image.size,
    pillow().Transform.AFFINE,
    data,
    pillow().Resampling.BILINEAR,
    fillcolor=fill if grey else (fill,) * 3,
  )
  return to_pixels(warped_image)


def with_drawn_label(rng: np.random.Generator, a: Example, b: Example, share: float) -> Example:
  """Returns `a` with its own label or, with probability 1 - share, that of `b`.

  Raises:
    InputError: an example has more than one label, such as a pair of an image and its text.
  """
  if len(a[LABELS[0]]) != 1:
    raise InputError(
      f"mixed images draw a label, and an example here has {len(a[LABELS[0]])}; leave mixup and "
      "cutmix out of the task's augment"
    )
  return a if rng.random() < share else a | {name: b[name] for name in LABELS}
