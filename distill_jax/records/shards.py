"""Reading of records' bytes from the shards of a store, in a folder or at a URL.

Long records are read by range (`IndexedShards`): one request for each record, in which only the
record is read. Short records share compressed chunks, which array_record reads (`GroupedShards`).
Neither keeps more files open when a store has more shards.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from distill_jax.errors import InputError
from distill_jax.records import shard_index
from distill_jax.records.manifest import Manifest, Shard
from distill_jax.runtime import files

INDEXED_RECORDS = 2**22  # up to this number of records, indices are kept in memory: 64 MB
OPEN_SHARDS = 16  # shards of short records that are open at once
MEMORY = 2**27  # bytes of short records that are kept in memory
ERRORS = RuntimeError, ValueError, IndexError  # of array_record and of an index
Place = tuple[Shard, int]  # a shard, and the index of a record in the store


class IndexedShards:
  """Long records, each of which is read as one range of its shard.

  The index of a shard is read when one of its records is needed for the first time, and kept: 16
  bytes per record, i.e. 16 MB for a million records of 129 KB. In a store of more than
  INDEXED_RECORDS records only the entry of a record is read, by a separate request, each time.
  A local shard without an index, of an earlier version, is read once to make its entries.

  Args:
    folder: The folder or URL of the store.
    m: The manifest of the store.
  """

  def __init__(self, folder: str | Path, m: Manifest):
    self._folder, self._keeps_indices = folder, m.total <= INDEXED_RECORDS
    self._entries: dict[str, np.ndarray] = {}  # by name of the shard
    self._lock = threading.Lock()

  def read(self, places: Sequence[Place]) -> list[bytes]:
    """Returns records, read all at once.

    Raises:
      InputError: A shard or an index is damaged or cannot be read.
    """
    entries = self._entries_of(places)
    ranges = [
      (files.join(self._folder, shard.name), int(e["offset"]), int(e["offset"]) + int(e["length"]))
      for (shard, _), e in zip(places, entries, strict=True)
    ]
    records = []
    for place, entry, data in zip(places, entries, files.read_ranges(ranges), strict=True):
      with _damaged(self._folder, *place):
        records.append(shard_index.record_of(data, entry))
    return records

  def _entries_of(self, places: Sequence[Place]) -> list[np.void]:
    """Returns the entries of records, after reading those that are not in memory."""
    with self._lock:
      shards = {s.name: s for s, _ in places if s.name not in self._entries}
      for shard in shards.values():
        if not self._has_index(shard):
          self._entries[shard.name] = build(self._folder, shard)
      if self._keeps_indices:
        self._load([s for name, s in shards.items() if name not in self._entries])
    alone = {
      i: (self._index(shard), *shard_index.place_of(i - shard.first))
      for shard, i in places
      if shard.name not in self._entries
    }
    read = dict(zip(alone, files.read_ranges(list(alone.values())), strict=True))
    return [
      np.frombuffer(read[i], shard_index.ENTRY)[0]
      if i in read
      else self._entries[shard.name][i - shard.first]
      for shard, i in places
    ]

  def _load(self, shards: Sequence[Shard]) -> None:
    """Reads the indices of shards, all at once."""
    data = files.read_ranges([(self._index(s), 0, shard_index.size_of(s.count)) for s in shards])
    for shard, contents in zip(shards, data, strict=True):
      try:
        self._entries[shard.name] = shard_index.parse(contents, shard.count)
      except ValueError as e:
        raise _bad_index(self._folder, shard, str(e).rstrip(".")) from e

  def _has_index(self, shard: Shard) -> bool:
    """Returns True if the index exists; that of a URL always does, see `check`."""
    return files.is_remote(self._folder) or files.info(self._index(shard)) is not None

  def _index(self, shard: Shard) -> str:
    return files.join(self._folder, shard_index.name_of(shard.name))


class GroupedShards:
  """Short records, 64 of which share a compressed chunk, read through array_record.

  The records of the first shards that are needed are kept in memory, up to MEMORY. Any other record
  takes 14 us, in which its chunk is decompressed; at most OPEN_SHARDS shards are open, and each is
  opened at most once per call, in 0.2 ms. The shards of a URL are copied to a temporary folder when
  they are first needed: 36 bytes per record, e.g. 46 MB for the 1.28 million labels of ImageNet.

  Args:
    folder: The folder or URL of the store.
  """

  def __init__(self, folder: str | Path):
    self._folder = folder
    self._open: OrderedDict[str, array_record_module.ArrayRecordReader] = OrderedDict()  # by name
    self._records: dict[str, Sequence[bytes]] = {}  # all of a shard, by its name
    self._free = MEMORY
    self._copies: tempfile.TemporaryDirectory | None = None
    self._lock = threading.Lock()

  def read(self, places: Sequence[Place]) -> list[bytes]:
    """Returns records.

    Raises:
      InputError: A shard is damaged or cannot be read.
    """
    found = {}
    for shard, i in sorted(places, key=lambda place: place[1]):  # shard by shard
      with _damaged(self._folder, shard, i):
        records = self._records.get(shard.name)
        if records is None:
          found[i] = self._reader(shard).read([i - shard.first])[0]
        else:
          found[i] = records[i - shard.first]
    return [found[i] for _, i in places]

  def _reader(self, shard: Shard) -> array_record_module.ArrayRecordReader:
    """Returns the reader of a shard, which is opened if necessary."""
    with self._lock:
      if shard.name not in self._open:
        with _damaged(self._folder, shard):
          reader = shard_index.open_shard(self._local(shard), shard.count)
        self._open[shard.name] = reader
        self._keep(shard, reader)
        if len(self._open) > OPEN_SHARDS:
          self._open.popitem(last=False)  # closed when no thread uses it
      self._open.move_to_end(shard.name)
      return self._open[shard.name]

  def _keep(self, shard: Shard, reader: array_record_module.ArrayRecordReader) -> None:
    """Reads all records of a shard into memory if they fit; not those of a damaged one."""
    with contextlib.suppress(*ERRORS):
      size = len(reader.read([0])[0]) * shard.count
      if shard.name not in self._records and size <= self._free:
        self._records[shard.name] = reader.read_all()
        self._free -= size

  def _local(self, shard: Shard) -> Path:
    """Returns the local shard, or a copy of it."""
    if not files.is_remote(self._folder):
      return Path(self._folder, shard.name)
    if self._copies is None:
      self._copies = tempfile.TemporaryDirectory(prefix="distill-jax-")
    copy = Path(self._copies.name, shard.name)
    return copy if copy.exists() else fetch(self._folder, shard, copy)


def open_shards(folder: str | Path, m: Manifest) -> IndexedShards | GroupedShards:
  """Returns the reader of the shards of a store."""
  indexed = shard_index.has_index(m.seq_len)
  return IndexedShards(folder, m) if indexed else GroupedShards(folder)


def check(folder: str | Path, m: Manifest) -> None:
  """Checks by one listing that the files of a store are there and have their sizes.

  Raises:
    InputError: A shard is missing, a file has another size, or a store at a URL lacks an index.
  """
  found = files.listing(folder)
  for shard in m.shards:
    path, index = files.join(folder, shard.name), found.get(shard_index.name_of(shard.name))
    if shard.name not in found:
      raise InputError(f"{path} is missing. Run `record` again.")
    if (size := found[shard.name].size) != shard.bytes:
      raise InputError(
        f"{path} has {size} bytes; expected {shard.bytes}. Delete it and run `record` again."
      )
    if index is not None and index.size != (expected := shard_index.size_of(shard.count)):
      raise _bad_index(folder, shard, f"{index.size} bytes; expected {expected}")
  if files.is_remote(folder) and (missing := without_index(found, m)):
    raise InputError(
      f"{files.join(folder, missing[0].name)} has no index, because an earlier version wrote it. "
      f"Run `distill-jax inspect --workdir={folder}` once, which writes indices."
    )


def without_index(found: Container[str], m: Manifest) -> list[Shard]:
  """Returns the shards that should have an index and do not, given the names of the files."""
  indexed = shard_index.has_index(m.seq_len)
  return [s for s in m.shards if indexed and shard_index.name_of(s.name) not in found]


def write_missing_indices(folder: str | Path, m: Manifest) -> int:
  """Writes the indices of shards that have none; returns their number.

  Raises:
    InputError: A shard is damaged.
  """
  missing = without_index(files.listing(folder), m)
  for shard in missing:
    path = files.join(folder, shard_index.name_of(shard.name))
    files.write(path, shard_index.to_bytes(build(folder, shard)))
  return len(missing)


def digest(folder: str | Path, shard: Shard) -> str:
  """Returns the sha256 of a shard, in hex."""
  sha256 = hashlib.sha256()
  with files.open_read(files.join(folder, shard.name)) as f:
    while data := f.read(2**20):
      sha256.update(data)
  return sha256.hexdigest()


def build(folder: str | Path, shard: Shard) -> np.ndarray:
  """Returns the entries of the index of a shard, made from the shard itself.

  Raises:
    InputError: The shard is damaged.
  """
  with contextlib.ExitStack() as stack:
    if files.is_remote(folder):
      tmp = stack.enter_context(tempfile.TemporaryDirectory(prefix="distill-jax-"))
      path = fetch(folder, shard, Path(tmp, shard.name))
    else:
      path = Path(folder, shard.name)
    stack.enter_context(_damaged(folder, shard))
    return shard_index.build(path, shard.count)


def fetch(folder: str | Path, shard: Shard, copy: Path) -> Path:
  """Copies a shard of a URL to a local file, which appears when it is complete."""
  part = copy.with_name(f".{copy.name}")
  with files.open_read(files.join(folder, shard.name)) as source, part.open("wb") as f:
    shutil.copyfileobj(source, f, 2**20)
  return part.replace(copy)


@contextlib.contextmanager
def _damaged(folder: str | Path, shard: Shard, i: int | None = None) -> Iterator[None]:
  """Turns errors of array_record and of an index into InputErrors that name shard and record."""
  try:
    yield
  except ERRORS as e:
    if isinstance(e, InputError):
      raise
    where = "" if i is None else f" at record {i}"
    reason = str(e).split(";")[0].rstrip(".")
    raise InputError(
      f"{files.join(folder, shard.name)} is damaged{where} ({reason}). Delete it and run `record` "
      "again."
    ) from e


def _bad_index(folder: str | Path, shard: Shard, reason: str) -> InputError:
  return InputError(
    f"{files.join(folder, shard_index.name_of(shard.name))} is damaged ({reason}). Delete it and "
    f"run `distill-jax inspect --workdir={folder}`, which writes it again."
  )
