"""Weights in a Hugging Face folder: one safetensors file, or shards with an index.

The format: 8 bytes, the header's length; the header, a JSON object from tensor names to
dtype, shape and byte range; then the tensors, back to back, little-endian.
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
  """Where one tensor lies."""

  path: pathlib.Path
  dtype: np.dtype
  shape: tuple[int, ...]
  begin: int  # byte of the file
  end: int


class SafetensorsFolder:
  """Reads a folder's tensors, a slice at a time, from any thread.

  Raises:
    InputError: no safetensors here; a shard that is missing, outside the folder,
      truncated, or at odds with the index; a tensor given twice.
  """

  def __init__(self, folder: pathlib.Path):
    self.files, index = _shards(folder)
    self._entries: dict[str, SafetensorsTensor] = {}
    for path in self.files:
      for name, entry in read_header(path).items():
        if name in self._entries:
          first = self._entries[name].path.name
          raise InputError(f"{name} is in {first} and again in {path.name}; keep one of them")
        self._entries[name] = entry
    if index is not None:
      self._check_index(folder / INDEX, index)

  def _check_index(self, path: pathlib.Path, index: dict[str, str]) -> None:
    for name, shard in index.items():
      if name not in self._entries or self._entries[name].path.name != shard:
        raise InputError(f"{path} says that {name} is in {shard}, which does not hold it")
    if extra := sorted(self._entries.keys() - index.keys()):
      where = self._entries[extra[0]].path.name
      raise InputError(f"{where} holds {extra[0]}, which {path} does not name; fetch both again")

  def names(self) -> set[str]:
    return set(self._entries)

  def shape(self, name: str) -> tuple[int, ...]:
    return self._entries[name].shape

  def dtype(self, name: str) -> np.dtype:
    return self._entries[name].dtype

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """The rows of the slice come from the file; along other axes it is cut in memory.

    Read, not mapped: a mapped file counts as memory of this process once it is touched.
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
      raise InputError(f"{path} has become shorter since it was opened; fetch it again")
    into = into[n:]


def _shards(folder: pathlib.Path) -> tuple[tuple[pathlib.Path, ...], dict[str, str] | None]:
  """The files to read, and the index where there is one."""
  single, index = folder / SINGLE, folder / INDEX
  if index.exists():
    weight_map = read_hf_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
      raise InputError(f"{index} has no weight_map from tensor names to files; fetch it again")
    files = sorted(set(weight_map.values()))
    for name in files:
      # Only the name is judged: the Hub's cache keeps files as links to its blobs.
      if not name.endswith(".safetensors") or "/" in name or "\\" in name or "\0" in name:
        raise InputError(f"{index} names {name!r}, which is not a safetensors file in its folder")
      if not (folder / name).is_file():
        raise InputError(f"{index} names {name}, which is not in the folder; fetch that file")
    if single.exists() and SINGLE not in files:
      raise InputError(f"{folder} holds both {SINGLE} and {INDEX}; delete the one not meant")
    return tuple(folder / f for f in files), weight_map
  if single.is_file():
    return (single,), None
  if pickles := sorted(p.name for p in folder.glob("*.bin")):
    raise InputError(
      f"{folder} holds {pickles[0]}, a pickle that can run code; only safetensors are read: save "
      "the model again with save_pretrained(dir, safe_serialization=True)"
    )
  raise InputError(f"{folder} holds neither {SINGLE} nor {INDEX}; give a folder with weights")


def read_header(path: pathlib.Path) -> dict[str, SafetensorsTensor]:
  """The tensors of one file; every length, type and byte range is checked against the file."""
  size = path.stat().st_size
  with path.open("rb") as f:
    n = int.from_bytes(f.read(8), "little")
    if size < 8 or n > min(MAX_HEADER, size - 8):
      raise InputError(
        f"{path} is {size} bytes and its header claims {n}; it is truncated or no safetensors "
        "file, fetch it again"
      )
    header = parse_hf_json(f.read(n), f"the header of {path}")
  header.pop("__metadata__", None)
  entries = {name: _entry(path, name, raw, 8 + n) for name, raw in header.items()}
  at = 8 + n
  for name, e in sorted(entries.items(), key=lambda item: item[1][3:]):
    if e.begin != at:
      raise InputError(f"{path}: {name} begins at byte {e.begin} and not at {at}; fetch it again")
    at = e.end
  if at != size:
    raise InputError(
      f"{path} is {size} bytes and its tensors end at {at}: truncated, or junk; fetch it again"
    )
  return entries


def _is_sizes(x: object) -> TypeGuard[list[int]]:
  return isinstance(x, list) and all(type(n) is int and 0 <= n < 2**63 for n in x)


def _entry(path: pathlib.Path, name: str, raw: object, start: int) -> SafetensorsTensor:
  if not isinstance(raw, dict) or raw.keys() != {"dtype", "shape", "data_offsets"}:
    raise InputError(f"{path}: {name} is not described by dtype, shape and data_offsets")
  kind, shape, span = raw["dtype"], raw["shape"], raw["data_offsets"]
  if not isinstance(kind, str) or kind not in DTYPES:
    raise InputError(f"{path}: {name} has dtype {kind!r}; known are {', '.join(DTYPES)}")
  if not _is_sizes(shape) or not _is_sizes(span) or len(span) != 2 or len(shape) > 16:
    raise InputError(f"{path}: {name} has shape {shape!r:.100} and data_offsets {span!r:.100}")
  dtype = np.dtype(DTYPES[kind])
  if span[1] - span[0] != math.prod(shape) * dtype.itemsize:
    raise InputError(
      f"{path}: {name} is {kind} of shape {shape}, which is not the {span[1] - span[0]} bytes given"
    )
  return SafetensorsTensor(path, dtype, tuple(shape), start + span[0], start + span[1])
