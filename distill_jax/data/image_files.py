"""Image files to arrays."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.runtime import extras

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


def pillow() -> Any:
  """Returns the module PIL.Image, which the extra "images" installs."""
  with extras.needed("images"):
    from PIL import Image
  return Image


def decode_errors() -> tuple[type[Exception], ...]:
  """Returns what Pillow raises for bytes that are not a whole image or are unsafely large."""
  return OSError, SyntaxError, ValueError, pillow().DecompressionBombError


def in_folder(folder: Path) -> list[Path]:
  """Returns the image files in a folder, sorted by name."""
  return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)


def decode(raw: bytes, size: int, channels: int) -> np.ndarray | None:
  """Decodes an image as CLIP's processor cuts it.

  The shorter side is brought to `size` (bicubic), and the middle taken.

  Returns:
    uint8 [size, size, channels]; None if the bytes are not an image.
  """
  Image = pillow()
  try:
    with Image.open(io.BytesIO(raw)) as opened:
      image = opened.convert("L" if channels == 1 else "RGB")
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
  """Returns (pixels - mean) / std of each channel, float32, where pixels are from 0 to 1."""
  mean_M, std_M = (np.asarray(x, np.float32) for x in (mean, std))
  return (pixels_WWM.astype(np.float32) / 255 - mean_M) / std_M
