"""Checks of numbers before they are stored."""

from __future__ import annotations

import numpy as np

from distill_jax.errors import InputError


def integers(x: np.ndarray, limit: int, name: str) -> np.ndarray:
  """Returns x as an array.

  Raises:
    InputError: x does not hold integers from 0 to below the limit.
  """
  x = np.asarray(x)
  if x.dtype.kind not in "iu" or (x.size and (x.min() < 0 or x.max() >= limit)):
    found = f"{x.dtype}" + (f" from {x.min()} to {x.max()}" if x.size else "")
    raise InputError(
      f"{name} is {found}; expected integers from 0 to {limit - 1}. Check the teacher and the "
      "tokenizer."
    )
  return x


def half(x: np.ndarray, name: str) -> bytes:
  """Returns x as float16 bytes, saturated instead of infinite.

  Raises:
    InputError: x is not finite.
  """
  finite(x, name)
  return np.clip(x, -65504, 65504).astype("<f2").tobytes()


def finite(x: np.ndarray, name: str) -> None:
  """Raises InputError if x has NaN or infinity."""
  if not np.all(np.isfinite(x)):
    raise InputError(
      f"{name} is {x[~np.isfinite(x)][0]} at a position with targets; expected finite numbers. "
      "Check the teacher."
    )
