"""The interface of readers of weights, and functions for JSON and text files of a checkpoint."""

from __future__ import annotations

import json
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np

from distill_jax.errors import InputError, check_choice
from distill_jax.runtime import files, json_io
from distill_jax.types import JsonObject

# The dtypes of stored parameters. Other dtypes need a reader that applies their scales.
FLOATS = {
  "float32": np.dtype(np.float32),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
  "float16": np.dtype(np.float16),
}

Index = tuple[slice, ...]


class WeightFile(NamedTuple):
  """A file of weights.

  Attributes:
    path: its path or URL.
    info: its size and version when it was opened.
    header: the SHA-256 digest, in hex, of the names, shapes and places of its tensors.
  """

  path: str
  info: files.FileInfo
  header: str


class Weights(Protocol):
  """A reader of tensors, or slices of them, by Hugging Face name."""

  files: tuple[WeightFile, ...]

  def names(self) -> set[str]: ...

  def shape(self, name: str) -> tuple[int, ...]: ...

  def dtype(self, name: str) -> np.dtype:
    """Returns the dtype of the array that `read` returns."""

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """Returns the tensor, or the part at `index`: one slice per axis, with step 1."""


def float_dtype(name: str) -> np.dtype:
  """Returns the numpy dtype for "float32", "bfloat16" or "float16"; others raise InputError."""
  check_choice("dtype", name, FLOATS, "Choose one of them")
  return FLOATS[name]


def parse_hf_json(text: bytes | str, subject: str) -> JsonObject:
  """Parses a JSON object of a checkpoint; a duplicate key raises InputError, too."""
  return json_io.parse_object(text, subject, "Download or write the file again", unique_keys=True)


def read_hf_json(path: str) -> JsonObject:
  """Reads the JSON object in a file of a checkpoint, by path or URL."""
  return parse_hf_json(files.read(path), path)


def hf_json(value: JsonObject) -> bytes:
  """Returns JSON in the style of the Hugging Face libraries: indented by 2, keys not sorted."""
  return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_text(path: str) -> str:
  """Reads a UTF-8 text file of a checkpoint, by path or URL."""
  try:
    return json_io.decode_utf8(files.read(path), action="Download the file again")
  except InputError as e:
    raise InputError(f"{path}: {e}") from e
