"""Checks of numbers before they are stored, and of the sizes of stored fields."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

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


def whole(noun: str, found_B: Sequence[int], want_B: Sequence[int]) -> None:
  """Raises InputError if the number of something in a record is not the expected one.

  Args:
    noun: What is counted.
    found_B: The number in each record.
    want_B: The expected number in each record.
  """
  if found_B != want_B:
    found, want = next((a, b) for a, b in zip(found_B, want_B, strict=True) if a != b)
    raise InputError(f"A record has {found} {noun}; expected {want}.")


def starts(count_B: Sequence[int]) -> list[int]:
  """Returns the index of the first of each record's things, which are joined in order."""
  return [0, *itertools.accumulate(count_B[:-1])]
