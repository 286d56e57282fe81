"""Reads the weights in a Hugging Face folder: one safetensors file, or shards with an index.

A safetensors file starts with the length of the header (8 bytes). The header is a JSON object with
the dtype, shape and byte range of each tensor. Then follow the tensors, without gaps, in
little-endian order.
"""

from __future__ import annotations

import math
import pathlib
from typing import BinaryIO, NamedTuple, TypeGuard

import ml_dtypes
import numpy as np

from distill_jax.errors import InputError
from distill_jax.hub.weights import Index, parse_hf_json, read_hf_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000  # bytes: the limit of the safetensors library
DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "F8_E4M3": ml_dtypes.float8_e4m3fn,
  "F8_E5M2": ml_dtypes.float8_e5m2,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U64": np.uint64,
  "U32": np.uint32,
  "U16": np.uint16,
  "U8": np.uint8,
  "BOOL": np.bool_,
}


class SafetensorsTensor(NamedTuple):
  """The dtype, shape and position of a tensor."""

  path: pathlib.Path
  dtype: np.dtype
  shape: tuple[int, ...]
  begin: int  # in bytes from the start of the file
  end: int


class SafetensorsFolder:
  """A reader of the tensors in a folder, or slices of them, that any thread can use.

  Raises:
    InputError: The folder has no safetensors; a shard is missing, outside the folder or truncated,
      or does not agree with the index; or a tensor occurs twice.
  """

  def __init__(self, folder: pathlib.Path):
    self.files, index = _shards(folder)
    self._entries: dict[str, SafetensorsTensor] = {}
    for path in self.files:
      for name, entry in read_header(path).items():
        if name in self._entries:
          first = self._entries[name].path.name
          raise InputError(f"{name} is in both {first} and {path.name}. Download the files again.")
        self._entries[name] = entry
    if index is not None:
      self._check_index(folder / INDEX, index)

  def _check_index(self, path: pathlib.Path, index: dict[str, str]) -> None:
    for name, shard in index.items():
      if name not in self._entries or self._entries[name].path.name != shard:
        raise InputError(
          f"{path} lists {name} in {shard}, but it is not in this file. Download both again."
        )
    if extra := sorted(self._entries.keys() - index.keys()):
      where = self._entries[extra[0]].path.name
      raise InputError(
        f"{where} contains {extra[0]}, which {path} does not list. Download both again."
      )

  def names(self) -> set[str]:
    return set(self._entries)

  def shape(self, name: str) -> tuple[int, ...]:
    return self._entries[name].shape

  def dtype(self, name: str) -> np.dtype:
    return self._entries[name].dtype

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """Returns the tensor, or the slice at `index`.

    Only rows in the slice are read; other axes are sliced in memory. The file is not mapped,
    because mapped pages would count as memory of this process.
    """
    e = self._entries[name]
    first, last, _ = index[0].indices(e.shape[0]) if index and e.shape else (0, 1, 1)
    rows = (last - first, *e.shape[1:]) if index and e.shape else e.shape
    x = np.empty(rows, e.dtype)
    row = (e.end - e.begin) // e.shape[0] if index and e.shape and e.shape[0] else 0
    with e.path.open("rb", buffering=0) as f:
      f.seek(e.begin + first * row)
      _fill(f, x.reshape(-1).view(np.uint8).data, e.path)
    return x if not index else x[(slice(None), *index[1:])]


def _fill(f: BinaryIO, into: memoryview, path: pathlib.Path) -> None:
  while len(into):
    if not (n := f.readinto(into)):  # type: ignore[attr-defined]
      raise InputError(f"{path} has become shorter since it was opened. Download it again.")
    into = into[n:]


def _shards(folder: pathlib.Path) -> tuple[tuple[pathlib.Path, ...], dict[str, str] | None]:
  """Returns the files to read, and the index or None."""
  single, index = folder / SINGLE, folder / INDEX
  if index.exists():
    weight_map = read_hf_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
      raise InputError(f"{index} has no weight_map from tensor names to files. Download it again.")
    files = sorted(set(weight_map.values()))
    for name in files:
      # Only the name is checked, because files in the cache of the Hub are links to its blobs.
      if not name.endswith(".safetensors") or "/" in name or "\\" in name or "\0" in name:
        raise InputError(
          f"{index} lists {name!r}, which is not a safetensors file in its folder. Download it "
          "again."
        )
      if not (folder / name).is_file():
        raise InputError(f"{index} lists {name}, which is not in the folder. Download that file.")
    if single.exists() and SINGLE not in files:
      raise InputError(f"{folder} contains both {SINGLE} and {INDEX}. Delete one of them.")
    return tuple(folder / f for f in files), weight_map
  if single.is_file():
    return (single,), None
  if pickles := sorted(p.name for p in folder.glob("*.bin")):
    raise InputError(
      f"{folder} contains {pickles[0]}, a pickle, which can run code; expected safetensors. Save "
      "the model again with save_pretrained(dir, safe_serialization=True)."
    )
  raise InputError(f"{folder} contains neither {SINGLE} nor {INDEX}. Use a folder with weights.")


def read_header(path: pathlib.Path) -> dict[str, SafetensorsTensor]:
  """Returns the tensors of a file; all lengths, types and byte ranges are checked."""
  size = path.stat().st_size
  with path.open("rb") as f:
    n = int.from_bytes(f.read(8), "little")
    if size < 8 or n > min(MAX_HEADER, size - 8):
      raise InputError(
        f"{path} has {size} bytes, but its header claims {n} bytes: it is truncated or not a "
        "safetensors file. Download it again."
      )
    header = parse_hf_json(f.read(n), f"The header of {path}")
  header.pop("__metadata__", None)
  entries = {name: _entry(path, name, raw, 8 + n) for name, raw in header.items()}
  at = 8 + n
  for name, e in sorted(entries.items(), key=lambda item: item[1][3:]):
    if e.begin != at:
      raise InputError(
        f"{path}: {name} starts at byte {e.begin}; expected byte {at}. Download the file again."
      )
    at = e.end
  if at != size:
    raise InputError(
      f"{path} has {size} bytes, but its tensors end at byte {at}: it is truncated or damaged. "
      "Download it again."
    )
  return entries


def _is_sizes(x: object) -> TypeGuard[list[int]]:
  return isinstance(x, list) and all(type(n) is int and 0 <= n < 2**63 for n in x)


def _entry(path: pathlib.Path, name: str, raw: object, start: int) -> SafetensorsTensor:
  if not isinstance(raw, dict) or raw.keys() != {"dtype", "shape", "data_offsets"}:
    raise InputError(
      f"{path}: {name} does not have dtype, shape and data_offsets. Download the file again."
    )
  kind, shape, span = raw["dtype"], raw["shape"], raw["data_offsets"]
  if not isinstance(kind, str) or kind not in DTYPES:
    raise InputError(
      f"{path}: {name} has dtype {kind!r}; expected one of {', '.join(DTYPES)}. Convert the "
      "weights."
    )
  if not _is_sizes(shape) or not _is_sizes(span) or len(span) != 2 or len(shape) > 16:
    raise InputError(
      f"{path}: {name} has shape {shape!r:.100} and data_offsets {span!r:.100}; expected lists of "
      "sizes. Download the file again."
    )
  dtype = np.dtype(DTYPES[kind])
  if span[1] - span[0] != math.prod(shape) * dtype.itemsize:
    raise InputError(
      f"{path}: {name} is {kind} with shape {shape}, which does not take the {span[1] - span[0]} "
      "bytes in its data_offsets. Download the file again."
    )
  return SafetensorsTensor(path, dtype, tuple(shape), start + span[0], start + span[1])
