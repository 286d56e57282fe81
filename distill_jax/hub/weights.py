"""What every reader of weights offers; the files of a checkpoint that are JSON or text."""

from __future__ import annotations

import pathlib
from typing import Protocol

import ml_dtypes
import numpy as np

from distill_jax.errors import InputError
from distill_jax.runtime import json_io
from distill_jax.types import JsonObject

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
    """The dtype of the array that `read` returns."""

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """The tensor, or the slice of it at `index`: one slice an axis, step 1."""


def float_dtype(name: str) -> np.dtype:
  """Returns the numpy dtype of "float32", "bfloat16" or "float16"; others raise InputError."""
  if name not in FLOATS:
    raise InputError(f"dtype {name!r} cannot hold parameters; choose one of {', '.join(FLOATS)}")
  return FLOATS[name]


def parse_hf_json(text: bytes | str, subject: str) -> JsonObject:
  """Parses a JSON object of a checkpoint; a key given twice, too, raises InputError."""
  return json_io.parse_object(text, subject, "fetch or write the file again", unique_keys=True)


def read_hf_json(path: pathlib.Path) -> JsonObject:
  """Reads the JSON object in a file of a checkpoint."""
  return parse_hf_json(path.read_bytes(), str(path))


def write_hf_json(path: pathlib.Path, value: JsonObject) -> None:
  """Writes JSON as the Hugging Face libraries do: two spaces, keys in their own order."""
  json_io.write_json(path, value, indent=2, sort_keys=False, ensure_ascii=False)


def read_text(path: pathlib.Path) -> str:
  """Reads a file of a checkpoint that has to be UTF-8."""
  try:
    return json_io.decode_utf8(path.read_bytes())
  except InputError as e:
    raise InputError(f"{path}: {e} Download the file again.") from e
