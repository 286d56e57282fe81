"""Reading a store: checked when it is opened, checked again at each record."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, SupportsIndex

import numpy as np
from array_record.python import array_record_module

from distill_jax.errors import InputError
from distill_jax.records import manifest as manifest_lib
from distill_jax.records import tf_example
from distill_jax.records.fields import Record
from distill_jax.records.manifest import Manifest, Shard, Taps
from distill_jax.records.writer import Writer, digest

if TYPE_CHECKING:  # reading a store needs no jax
  from distill_jax.types import JsonObject

__all__ = ["Manifest", "RecordSource", "Shard", "Store", "Taps", "Writer", "open_store"]


class RecordSource(Protocol):
  """Random access to records, all with the same fields."""

  def __len__(self) -> int:
    """Returns the number of records."""

  def __getitem__(self, index: int, /) -> Record:
    """Returns one record."""


class Store:
  """A finished store as a grain random-access source: `len(store)`, `store[i]`.

  `store[i]` is tokens_T int32, segments_T int32 and mask_T bool (of a task, labels_T and
  mask_T) and, by kind, what `codec.decode_targets` returns, with numpy arrays of one shape for
  every i. Pickles by its path; threads may share it.

  Attributes:
    folder: of the store.
    manifest: what it holds.
  """

  def __init__(self, folder: Path, manifest: Manifest):
    self.folder, self.manifest = folder, manifest
    self._firsts = np.array([s.first for s in manifest.shards])
    self._readers: dict[int, array_record_module.ArrayRecordReader] = {}
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return self.manifest.total

  def __getitem__(self, index: SupportsIndex) -> Record:
    i = index.__index__()
    if not 0 <= i < len(self):
      raise IndexError(f"record {i} of a store of {len(self)}")
    shard, data = self.read(i)
    try:
      return tf_example.decode(i, tf_example.parse(data), self.manifest)
    except InputError as e:
      raise InputError(
        f"{self.folder / shard.name}, record {i}: {e}; this shard is not the one that was "
        "written, so delete it and run `record` again"
      ) from e

  def read(self, i: int) -> tuple[Shard, bytes]:
    """Record i as it lies in its shard, and the shard."""
    number = int(np.searchsorted(self._firsts, i, side="right")) - 1
    shard = self.manifest.shards[number]
    with self._lock:
      if number not in self._readers:
        self._readers[number] = _reader(self.folder, shard)
      reader = self._readers[number]
    try:
      return shard, reader.read([i - shard.first])[0]
    except (RuntimeError, ValueError, IndexError) as e:
      raise InputError(
        f"{self.folder / shard.name}, record {i}: the file is damaged ({str(e).split(';')[0]}); "
        "delete it and run `record` again"
      ) from e

  def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
    """Checks every shard's digest and decodes every record.

    Args:
      progress: called after each record with how many of how many are done.

    Raises:
      InputError: the first shard or record that is not as it was written.
    """
    for shard in self.manifest.shards:
      if (found := digest(self.folder / shard.name)) != shard.sha256:
        raise InputError(
          f"{self.folder / shard.name} has digest {found[:12]}, the manifest {shard.sha256[:12]}; "
          "delete it and run `record` again"
        )
      for i in range(shard.first, shard.first + shard.count):
        self[i]
        if progress is not None:
          progress(i + 1, len(self))

  def __reduce__(self):
    return Store, (self.folder, self.manifest)


def open_store(folder: str | os.PathLike, expect: JsonObject | None = None) -> Store:
  """Opens a finished store, checking the manifest and every shard's presence, size and count.

  Args:
    folder: what `record` wrote.
    expect: fields of the manifest that must hold, as {"tokenizer": digest, "vocab_size": V}.
      A string for "teacher" is its digest.

  Raises:
    InputError: naming the file, or both sides of what does not match.
  """
  folder = Path(folder)
  m = manifest_lib.load(folder)
  for key, want in (expect or {}).items():
    if not hasattr(m, key):
      raise InputError(f"expect names {key!r}, which a manifest does not have")
    found = getattr(m, key)
    if key == "teacher" and isinstance(want, str):
      found = found.get("digest")
    if found != want:
      raise InputError(
        f"{folder} has {key}={found!r} and this run has {want!r}; use the records' own or record "
        "again"
      )
  planned = m.ranges
  if [range(s.first, s.first + s.count) for s in m.shards] != planned:
    raise InputError(
      f"{folder} holds {len(m.shards)} of {len(planned)} shards; recording is not finished, so run "
      "`record` again to finish it"
    )
  for shard in m.shards:
    _reader(folder, shard)
  return Store(folder, m)


def _reader(folder: Path, shard: Shard) -> array_record_module.ArrayRecordReader:
  """Opens a shard. The raw reader opens a damaged file as zero records: so count them."""
  path = folder / shard.name
  found = path.stat().st_size if path.is_file() else None
  if found != shard.bytes:
    fault = "is missing" if found is None else f"is {found} bytes, the manifest has {shard.bytes}"
    raise InputError(f"{path} {fault}; delete it and run `record` again")
  try:
    reader = array_record_module.ArrayRecordReader(str(path), "readahead_buffer_size:0")
    count = reader.num_records() if reader.ok() else 0
  except (RuntimeError, ValueError) as e:
    raise InputError(f"{path} does not open ({e}); delete it and run `record` again") from e
  if count != shard.count:
    raise InputError(
      f"{path} holds {count} records, the manifest has {shard.count}; delete it and run `record` "
      "again"
    )
  return reader
