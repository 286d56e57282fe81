"""Reads the weights in a Hugging Face folder: one safetensors file, or shards with an index.

The folder is local or in an object store, from which only the necessary ranges of bytes are read. A
safetensors file starts with the length of the header (8 bytes). The header is a JSON object with
the dtype, shape and byte range of each tensor. Then follow the tensors, without gaps, in little-
endian order.
"""

from __future__ import annotations

import hashlib
import math
import os
import pathlib
from typing import BinaryIO, NamedTuple, TypeGuard

import ml_dtypes
import numpy as np

from distill_jax.errors import InputError
from distill_jax.hub.weights import Index, WeightFile, parse_hf_json, read_hf_json
from distill_jax.runtime import files
from distill_jax.runtime.files import FileInfo

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

  path: str
  dtype: np.dtype
  shape: tuple[int, ...]
  begin: int  # in bytes from the start of the file
  end: int

  @property
  def file(self) -> str:
    """The name of the file."""
    return self.path.rpartition("/")[2]


class SafetensorsFolder:
  """A reader of the tensors in a folder, or slices of them, that any thread can use.

  Raises:
    InputError: The folder has no safetensors; a shard is missing, outside the folder or truncated,
      or does not agree with the index; or a tensor occurs twice.
  """

  def __init__(self, folder: str | os.PathLike[str]):
    names, infos, index = _shards(str(folder))
    paths = [files.join(folder, name) for name in names]
    headers = _read_headers(paths, infos)
    self.files = tuple(
      WeightFile(path, info, hashlib.sha256(header).hexdigest())
      for path, info, header in zip(paths, infos, headers, strict=True)
    )
    self._entries: dict[str, SafetensorsTensor] = {}
    for file, header in zip(self.files, headers, strict=True):
      for name, entry in _parse_header(file.path, file.info.size, header).items():
        if name in self._entries:
          first = self._entries[name].file
          raise InputError(f"{name} is in both {first} and {entry.file}. Download the files again.")
        self._entries[name] = entry
    if index is not None:
      self._check_index(files.join(folder, INDEX), index)

  def _check_index(self, path: str, index: dict[str, str]) -> None:
    for name, shard in index.items():
      if name not in self._entries or self._entries[name].file != shard:
        raise InputError(
          f"{path} lists {name} in {shard}, but it is not in this file. Download both again."
        )
    if extra := sorted(self._entries.keys() - index.keys()):
      where = self._entries[extra[0]].file
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
    row = (e.end - e.begin) // e.shape[0] if index and e.shape and e.shape[0] else 0
    begin = e.begin + first * row
    if files.is_remote(e.path):
      stop = begin + math.prod(rows) * e.dtype.itemsize
      (data,) = files.read_ranges([(e.path, begin, stop)])
      x = np.frombuffer(data, e.dtype).reshape(rows)
    else:
      x = np.empty(rows, e.dtype)
      with pathlib.Path(e.path).open("rb", buffering=0) as f:
        f.seek(begin)
        _fill(f, x.reshape(-1).view(np.uint8).data, e.path)
    return x if not index else x[(slice(None), *index[1:])]


def _fill(f: BinaryIO, into: memoryview, path: str) -> None:
  while len(into):
    if not (n := f.readinto(into)):  # type: ignore[attr-defined]
      raise InputError(f"{path} has become shorter since it was opened. Download it again.")
    into = into[n:]


def _shards(folder: str) -> tuple[list[str], list[FileInfo], dict[str, str] | None]:
  """Returns the names and versions of the files to read, and the index or None."""
  there = files.listing(folder)
  if INDEX in there:
    index = files.join(folder, INDEX)
    weight_map = read_hf_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
      raise InputError(f"{index} has no weight_map from tensor names to files. Download it again.")
    names = sorted(set(weight_map.values()))
    for name in names:
      # Only the name is checked, because files in the cache of the Hub are links to its blobs.
      if not name.endswith(".safetensors") or "/" in name or "\\" in name or "\0" in name:
        raise InputError(
          f"{index} lists {name!r}, which is not a safetensors file in its folder. Download it "
          "again."
        )
      if name not in there:
        raise InputError(f"{index} lists {name}, which is not in the folder. Download that file.")
    if SINGLE in there and SINGLE not in names:
      raise InputError(f"{folder} contains both {SINGLE} and {INDEX}. Delete one of them.")
    return names, [there[name] for name in names], weight_map
  if SINGLE in there:
    return [SINGLE], [there[SINGLE]], None
  if pickles := [name for name in there if name.endswith(".bin")]:
    raise InputError(
      f"{folder} contains {pickles[0]}, a pickle, which can run code; expected safetensors. Save "
      "the model again with save_pretrained(dir, safe_serialization=True)."
    )
  raise InputError(f"{folder} contains neither {SINGLE} nor {INDEX}. Use a folder with weights.")


def _read_headers(paths: list[str], infos: list[FileInfo]) -> list[bytes]:
  """Returns the headers of the files; two ranges of each are read."""
  sizes = [info.size for info in infos]
  firsts = files.read_ranges([(p, 0, min(8, n)) for p, n in zip(paths, sizes, strict=True)])
  lengths = [int.from_bytes(first, "little") for first in firsts]
  for path, size, n in zip(paths, sizes, lengths, strict=True):
    if size < 8 or n > min(MAX_HEADER, size - 8):
      raise InputError(
        f"{path} has {size} bytes, but its header claims {n} bytes: it is truncated or not a "
        "safetensors file. Download it again."
      )
  return files.read_ranges([(p, 8, 8 + n) for p, n in zip(paths, lengths, strict=True)])


def _parse_header(path: str, size: int, text: bytes) -> dict[str, SafetensorsTensor]:
  """Returns the tensors of a file; all lengths, types and byte ranges are checked."""
  header = parse_hf_json(text, f"The header of {path}")
  header.pop("__metadata__", None)
  at = 8 + len(text)
  entries = {name: _entry(path, name, raw, at) for name, raw in header.items()}
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


def _entry(path: str, name: str, raw: object, start: int) -> SafetensorsTensor:
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
