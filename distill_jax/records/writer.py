"""Writing of stores, by any number of processes that may be killed and resumed at any time.

A shard is written under a hidden name, checked, synced and renamed, and its index is written (see
shard_index.py). Then it is registered in a small file, `NAME.json`. Registered shards are never
written again. When all planned shards are registered, `complete` merges them into the manifest and
writes the files for tfds. Any process may call it, also repeatedly.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from array_record.python import array_record_module

from distill_jax.errors import InputError, bad_value
from distill_jax.records import codec, shard_index, tf_example, tfds_info
from distill_jax.records import manifest as manifest_lib
from distill_jax.records.fields import Record
from distill_jax.records.manifest import Manifest, Shard
from distill_jax.runtime import atomic_io, json_io


def array_record_options(seq_len: int) -> str:
  """Returns the options of array_record for records of `seq_len` positions.

  Long records have one chunk each, for random access, without compression, because their bits are
  already packed. Short records consist mostly of field names, so 64 of them share a compressed
  chunk: a record of one label with ten classes takes 36 instead of 285 bytes, and reading is as
  fast.
  """
  indexed = shard_index.has_index(seq_len)
  return "group_size:1,uncompressed" if indexed else "group_size:64,zstd:1"


class Writer:
  """Writer of the shards of one process. Use it as a context manager, or `close` it.

  Args:
    folder: The folder of the store, which is created if it does not exist.
    manifest: The manifest of this run, whose `extents` holds the total number of sequences. A
      folder with fewer sequences is extended; its finished shards are kept.
    process_index: Index of this process.
    process_count: Number of processes. Each writes its own shards.

  Attributes:
    folder: The folder of the store.
    manifest: The manifest of the folder, after extending it.

  Raises:
    InputError: The folder holds other records or more of them, cannot be written, or is in use by
      another process with this index.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    manifest: Manifest,
    process_index: int = 0,
    process_count: int = 1,
  ):
    if not 0 <= process_index < process_count:
      expected = f"from 0 to {process_count - 1}, below process_count"
      raise bad_value("process_index", process_index, expected, "Correct it")
    self.folder = Path(folder)
    self._process = f"{process_index}-of-{process_count}"
    with _writing(self.folder):
      self.folder.mkdir(parents=True, exist_ok=True)
      self._lock = _lock(self.folder / f".lock-{self._process}")
    try:
      self.manifest = self._join(manifest)
    except BaseException:
      self.close()
      raise

  def _join(self, want: Manifest) -> Manifest:
    """Returns the manifest of the folder, created or extended for this run."""
    if not (self.folder / manifest_lib.NAME).exists():
      found = dataclasses.replace(want, extents=(want.total,), shards=())
    else:
      found = manifest_lib.load(self.folder)
      manifest_lib.require_same(want, found, self.folder)
      if want.total < found.total:
        raise InputError(
          f"{self.folder} holds {found.total} sequences, but this run records {want.total}. Stores "
          "can only be extended; choose another folder."
        )
      if want.total == found.total:
        return found
      found = dataclasses.replace(found, extents=(*found.extents, want.total - found.total))
    with _writing(self.folder):
      found.save(self.folder)
    return found

  def lengthen(self, total: int) -> None:
    """Raises the total number of sequences while the store is being written.

    Shards that are already planned keep their ranges.

    Args:
      total: The new total.
    """
    *before, last = self.manifest.extents
    more = total - self.manifest.total
    # After a full shard the extent can grow without changing its ranges.
    whole = last % self.manifest.sequences_per_shard == 0
    extents = (*before, last + more) if whole else (*before, last, more)
    with _writing(self.folder):
      self.manifest = dataclasses.replace(self.manifest, extents=extents)
      self.manifest.save(self.folder)

  def missing(self) -> list[range]:
    """Returns the ranges of sequences that are still to be written, in order.

    Registered shards whose files are missing or have another size are included.
    """
    done = self.finished()
    return [r for r in self.manifest.ranges if r.start not in done]

  def finished(self) -> dict[int, Shard]:
    """Returns the registered shards of all processes whose files exist, by first sequence."""
    known = {s.first: s for s in self.manifest.shards}
    for number, r in enumerate(self.manifest.ranges):
      if (path := self._registration(number)).exists():
        known[r.start] = Shard(**json_io.read_object(path, "delete it and run `record` again"))
    return {first: s for first, s in known.items() if is_there(self.folder, s)}

  def write_shard(self, sequences_of: range, sequences: Iterable[Record]) -> Shard:
    """Writes a shard; returns when it is on disk and registered.

    Args:
      sequences_of: The range of sequences, one of `missing()`.
      sequences: The records of the range, in order; see codec.encode_targets.

    Raises:
      InputError: The range is not a planned shard, the number of records differs, the disk is full,
        or another writer has registered different bytes for this shard.
    """
    ranges = self.manifest.ranges
    if sequences_of not in ranges:
      raise InputError(
        f"The range {sequences_of.start} to {sequences_of.stop} is not a shard of {self.folder}. "
        "Write the ranges of missing()."
      )
    number = ranges.index(sequences_of)
    path = self.folder / manifest_lib.shard_name(number)
    part = self.folder / f".writing-{number:05d}-{self._process}"
    with _writing(path):
      part.unlink(missing_ok=True)
      totals = self._write(part, sequences_of, sequences)
      index = self._index(part, len(sequences_of))
      shard = Shard(
        name=path.name,
        first=sequences_of.start,
        count=len(sequences_of),
        bytes=part.stat().st_size,
        sha256=digest(part),
        **totals,
      )
      self._publish(part, path, shard, number, index)
    return shard

  def _write(self, part: Path, sequences_of: range, sequences: Iterable[Record]) -> dict:
    fields: dict[str, int] = dict.fromkeys(tf_example.names(self.manifest), 0)
    tokens = targets = entries = count = 0
    writer = array_record_module.ArrayRecordWriter(
      str(part), array_record_options(self.manifest.seq_len)
    )
    try:
      for seq in sequences:
        if count == len(sequences_of):
          raise InputError(
            f"Shard {part.name} got more than {count} records. Pass one per sequence."
          )
        record = tf_example.encode(sequences_of[count], seq, self.manifest)
        writer.write(tf_example.serialize(record))
        count += 1
        tokens += int((tf_example.segments(seq, self.manifest) > 0).sum())
        if self.manifest.kind != "text":
          targets += int(seq["mask_T"].sum())
          entries += codec.count_entries(record)
        for name, value in record.items():
          fields[name] += len(value)
    finally:
      writer.close()
    if count != len(sequences_of):
      raise InputError(
        f"Shard {part.name} got {count} records; expected {len(sequences_of)}. Pass one per "
        "sequence."
      )
    with part.open("rb") as f:
      os.fsync(f.fileno())
    return {"tokens": tokens, "targets": targets, "entries": entries, "fields": fields}

  def _index(self, part: Path, count: int) -> bytes | None:
    """Checks a shard and returns its index; None for a shard without one."""
    try:
      if shard_index.has_index(self.manifest.seq_len):
        return shard_index.to_bytes(shard_index.build(part, count))
      shard_index.open_shard(part, count).close()
    except ValueError as e:
      raise InputError(
        f"{part} is incomplete ({str(e).rstrip('.')}); the disk may be full. Free space and run "
        "the command again."
      ) from e
    return None

  def _publish(
    self, part: Path, path: Path, shard: Shard, number: int, index: bytes | None
  ) -> None:
    # A writer with another process count may have registered this shard.
    if (other := self.finished().get(shard.first)) is not None:
      part.unlink()
      if other.sha256 != shard.sha256:
        raise InputError(
          f"{path} was finished by another writer with digest {other.sha256[:12]}, but this writer "
          f"has digest {shard.sha256[:12]}. Stop one of the two recordings."
        )
      return
    part.replace(path)
    atomic_io.fsync_dir(self.folder)
    if index is not None:
      atomic_io.atomic_write(self.folder / shard_index.name_of(path.name), index)
    atomic_io.atomic_write(self._registration(number), json.dumps(dataclasses.asdict(shard)) + "\n")

  def _registration(self, number: int) -> Path:
    return self.folder / f"{manifest_lib.shard_name(number)}.json"

  def complete(self) -> Manifest | None:
    """Merges the registered shards into the manifest, if all planned shards are registered.

    Returns:
      The finished manifest, or None while other processes still have shards to write.
    """
    shards = self.finished()
    if len(shards) < len(self.manifest.ranges):
      return None
    done = dataclasses.replace(self.manifest, shards=tuple(shards[k] for k in sorted(shards)))
    with _writing(self.folder):
      tfds_info.write(self.folder, done)
      done.save(self.folder)  # last, because it marks the folder as complete
      for stale in self.folder.glob(".writing-*"):
        stale.unlink(missing_ok=True)
    self.manifest = done
    return done

  def close(self) -> None:
    self._lock.close()  # releases the lock

  def __enter__(self) -> Writer:
    return self

  def __exit__(self, *_) -> None:
    self.close()


def is_there(folder: Path, shard: Shard) -> bool:
  path = folder / shard.name
  return path.is_file() and path.stat().st_size == shard.bytes


def digest(path: Path) -> str:
  """Returns the sha256 of a file, in hex."""
  with path.open("rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()


def _lock(path: Path) -> IO[str]:
  """Returns a locked file. Closing it or the end of the process releases the lock."""
  f = path.open("a+")
  try:
    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as e:
    f.seek(0)
    holder = f.read().strip() or "another process"
    f.close()
    raise InputError(f"{path.parent} is being written by {holder}. Wait for it, or stop it.") from e
  f.truncate(0)
  f.write(f"process {os.getpid()}")
  f.flush()
  return f


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
  """Turns errors of the system and of array_record on writing into InputErrors."""
  try:
    yield
  except InputError:
    raise
  except (OSError, RuntimeError) as e:
    why = getattr(e, "strerror", None) or str(e).split(";")[0]
    raise InputError(
      f"{path} cannot be written ({why}). Free space or choose another folder, and run again; "
      "finished shards are kept."
    ) from e
