"""Reading image files as arrays."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.runtime import extras

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
MODES = {1: "L", 3: "RGB"}  # Pillow's names of grey and colour, by number of channels


def pillow() -> Any:
  """Returns the module PIL.Image, which the extra "images" installs."""
  with extras.needed("images"):
    from PIL import Image
  return Image


def decode_errors() -> tuple[type[Exception], ...]:
  """Returns the exceptions that Pillow raises for damaged images and for images of unsafe size."""
  return OSError, SyntaxError, ValueError, pillow().DecompressionBombError


def in_folder(folder: Path) -> list[Path]:
  """Returns the image files in a folder, sorted by name."""
  return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)


def with_channels(image: Any, channels: int) -> Any:
  """Returns an image of Pillow with 8 bits per channel.

  Args:
    image: The image. Of 16-bit grey, which Pillow would clip at 255, the upper 8 bits are used.
    channels: 1 for grey, 3 for colour.
  """
  if image.mode.startswith("I"):  # "I;16", and "I" in older versions of Pillow
    upper = np.asarray(image).astype(np.int32) >> 8
    image = pillow().fromarray(upper.clip(0, 255).astype(np.uint8))
  return image.convert(MODES[channels])


def decode(raw: bytes, size: int, channels: int) -> np.ndarray | None:
  """Decodes an image and resizes it as CLIP's processor does.

  The shorter side is resized to `size` pixels (bicubic) and the centre is cropped.

  Args:
    raw: The bytes of an image file.
    size: The height and width of the result in pixels.
    channels: 1 for grey, 3 for colour.

  Returns:
    uint8 [size, size, channels], or None if the bytes are not an image.
  """
  Image = pillow()
  try:
    with Image.open(io.BytesIO(raw)) as opened:
      image = with_channels(opened, channels)
  except decode_errors():
    return None
  short = min(image.size)
  if short != size:
    width, height = (max(size, int(size * n / short)) for n in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
  left, top = ((n - size) // 2 for n in image.size)
  image = image.crop((left, top, left + size, top + size))
  return np.asarray(image, np.uint8).reshape(size, size, channels)


def normalised(pixels_WWM: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
  """Normalises an image: (pixels / 255 - mean) / std for each channel.

  Args:
    pixels_WWM: uint8 [W, W, M].
    mean: The mean of each channel, for pixels in [0, 1].
    std: The standard deviation of each channel, for pixels in [0, 1].

  Returns:
    float32 [W, W, M].
  """
  mean_M, std_M = (np.asarray(x, np.float32) for x in (mean, std))
  return (pixels_WWM.astype(np.float32) / 255 - mean_M) / std_M
