"""Numbers that are checked before they are stored."""

from __future__ import annotations

import numpy as np

from distill_jax.errors import InputError


def integers(x: np.ndarray, limit: int, name: str) -> np.ndarray:
  """Returns x as an array; refuses what are not integers from 0 to below the limit."""
  x = np.asarray(x)
  if x.dtype.kind not in "iu" or (x.size and (x.min() < 0 or x.max() >= limit)):
    found = f"{x.dtype}" + (f" from {x.min()} to {x.max()}" if x.size else "")
    raise InputError(f"{name} is {found}; it holds integers from 0 to {limit - 1}")
  return x


def half(x: np.ndarray, name: str) -> bytes:
  """Returns float16 bytes, saturated rather than infinite; refuses what is not finite."""
  finite(x, name)
  return np.clip(x, -65504, 65504).astype("<f2").tobytes()


def finite(x: np.ndarray, name: str) -> None:
  """Refuses NaN and infinity."""
  if not np.all(np.isfinite(x)):
    raise InputError(
      f"{name} holds {x[~np.isfinite(x)][0]} where mask_T is set; every recorded number is "
      "finite, so look at the teacher"
    )
