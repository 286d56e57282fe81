"""Image operations shared by augmentations: Pillow conversion, warping and mixing."""

from __future__ import annotations

from typing import Any

import numpy as np

from distill_jax.augmentations import Example
from distill_jax.data.image_files import pillow
from distill_jax.errors import InputError, bad_value

PIXELS, LABELS = "pixels_WWM", ("labels_T", "mask_T")


def check_probability(name: str, p: float) -> None:
  """Raises InputError if the value of the key `name` is not a probability."""
  if not 0 <= p <= 1:
    raise bad_value(name, p, "a probability from 0 to 1", "Correct it")


def to_pillow(pixels_WWM: np.ndarray) -> Any:
  """Returns a Pillow image: grey for one channel, RGB for three."""
  return pillow().fromarray(pixels_WWM[..., 0] if pixels_WWM.shape[-1] == 1 else pixels_WWM)


def to_pixels(image: Any) -> np.ndarray:
  """Returns the pixels of a Pillow image, uint8 [height, width, 1 or 3]."""
  pixels = np.asarray(image)
  return pixels[..., None] if pixels.ndim == 2 else pixels


def warped(pixels_WWM: np.ndarray, matrix: np.ndarray, fill: int = 0) -> np.ndarray:
  """Returns an affine warp: point (x, y) of the result is point `matrix` @ (x, y, 1) of the image.

  Args:
    pixels_WWM: The image. Points are relative to its centre.
    matrix: float [2, 3], in pixels, with x to the right and y downwards.
    fill: Grey level of points outside the image.
  """
  image = to_pillow(pixels_WWM)
  (a, b, c), (d, e, f) = matrix
  cx, cy = image.width / 2, image.height / 2  # Pillow measures from the corner
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
  """Returns `a` with its own label or, with probability 1 - share, the label of `b`.

  Raises:
    InputError: An example has more than one label, e.g. a pair of an image and a text.
  """
  if len(a[LABELS[0]]) != 1:
    raise InputError(
      f"mixup and cutmix need one label per example, but these examples have "
      f"{len(a[LABELS[0]])}. Remove them from the task's key `augment`."
    )
  return a if rng.random() < share else a | {name: b[name] for name in LABELS}
