"""What every reader of weights offers, and the reading that they share."""

from __future__ import annotations

import json
import pathlib
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from distill_jax.errors import InputError

# What parameters may be stored as; anything else needs a reader that knows its scales.
FLOATS = {
  "float32": np.dtype(np.float32),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
  "float16": np.dtype(np.float16),
}

Index = tuple[slice, ...]


class Weights(Protocol):
  """Tensors by their Hugging Face names, read a slice at a time."""

  files: tuple[pathlib.Path, ...]

  def names(self) -> set[str]: ...

  def shape(self, name: str) -> tuple[int, ...]: ...

  def dtype(self, name: str) -> np.dtype:
    """Of what `read` returns."""

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """The tensor, or the slice of it at `index`: one slice an axis, step 1."""


def float_dtype(name: str) -> np.dtype:
  """The numpy dtype of "float32", "bfloat16" or "float16"; another name raises InputError."""
  if name not in FLOATS:
    raise InputError(f"dtype {name!r} cannot hold parameters; choose one of {', '.join(FLOATS)}")
  return FLOATS[name]


def parse_json(text: bytes, what: str) -> dict[str, Any]:
  """A JSON object; not JSON, not an object, or a key given twice raises InputError."""

  def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
      keys = [k for k, _ in pairs]
      twice = next(k for k in keys if keys.count(k) > 1)
      raise InputError(f"{what} names {twice!r} twice; fetch or write the file again")
    return out

  try:
    value = json.loads(text.decode(), object_pairs_hook=no_twins)
  except InputError:
    raise
  # ValueError: not UTF-8, not JSON, or a number with thousands of digits.
  except (ValueError, RecursionError) as e:
    raise InputError(f"{what} is not JSON ({e}); fetch or write the file again") from e
  if not isinstance(value, dict):
    raise InputError(f"{what} is a JSON {type(value).__name__} where an object was expected")
  return value


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The JSON object in a file."""
  return parse_json(path.read_bytes(), str(path))


def read_text(path: pathlib.Path) -> str:
  """The text of a file, which has to be UTF-8."""
  try:
    return path.read_bytes().decode()
  except UnicodeDecodeError as e:
    raise InputError(f"{path} is not UTF-8 ({e}); fetch the file again") from e
