"""Writing a store: any number of processes, killed and resumed at any moment.

A shard is written under a hidden name, checked, fsynced, renamed, and only then registered
by a small file of its own, `NAME.json`. What is registered is never written again. When
every planned shard is registered, `complete` merges them into the manifest and describes
the folder for tfds; any process may do it, and doing it twice changes nothing.
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

from distill_jax.errors import InputError
from distill_jax.records import codec, tf_example, tfds_info
from distill_jax.records import manifest as manifest_lib
from distill_jax.records.fields import Record
from distill_jax.records.manifest import Manifest, Shard
from distill_jax.runtime import atomic_io, json_io


def array_record_options(seq_len: int) -> str:
  """What array_record is asked for, by the positions of a record.

  One record a chunk, for random access; its bits are packed already, and zstd finds nothing. A
  record of few positions is mostly the names of its fields, so 64 share a compressed chunk: of
  one label with ten classes that is 36 bytes for 285, and is read no slower.
  """
  return "group_size:64,zstd:1" if seq_len < 8 else "group_size:1,uncompressed"


class Writer:
  """Writes the shards of one process. Use as a context manager, or `close` it.

  Args:
    folder: made if it is not there.
    manifest: what this run records, `extents` holding the one total wanted. A folder that
      holds fewer sequences is extended; its finished shards stay as they are.
    process_index, process_count: shard s belongs to process s % process_count.

  Raises:
    InputError: the folder holds other records, more of them, cannot be written to, or
      another process with this index writes there now.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    manifest: Manifest,
    process_index: int = 0,
    process_count: int = 1,
  ):
    if not 0 <= process_index < process_count:
      raise InputError(f"process {process_index} of {process_count}: the index is below the count")
    self.folder = Path(folder)
    self._process = f"{process_index}-of-{process_count}"
    self._own_shards = slice(process_index, None, process_count)
    with _writing(self.folder):
      self.folder.mkdir(parents=True, exist_ok=True)
      self._lock = _lock(self.folder / f".lock-{self._process}")
    try:
      self.manifest = self._join(manifest)
    except BaseException:
      self.close()
      raise

  def _join(self, want: Manifest) -> Manifest:
    """The folder's manifest, made or extended to hold what is wanted."""
    if not (self.folder / manifest_lib.NAME).exists():
      found = dataclasses.replace(want, extents=(want.total,), shards=())
    else:
      found = manifest_lib.load(self.folder)
      manifest_lib.require_same(want, found, self.folder)
      if want.total < found.total:
        raise InputError(
          f"{self.folder} holds {found.total} sequences and this run wants {want.total}; records "
          "are only ever extended, so choose another folder"
        )
      if want.total == found.total:
        return found
      found = dataclasses.replace(found, extents=(*found.extents, want.total - found.total))
    with _writing(self.folder):
      found.save(self.folder)
    return found

  def missing(self) -> list[range]:
    """The ranges of sequences that this process has still to write, in order.

    A registered shard whose file is gone, or has another size, is written again.
    """
    done = self.finished()
    return [r for r in self.manifest.ranges[self._own_shards] if r.start not in done]

  def finished(self) -> dict[int, Shard]:
    """Registered shards that are there, by any process: by first sequence."""
    known = {s.first: s for s in self.manifest.shards}
    for number, r in enumerate(self.manifest.ranges):
      if (path := self._registration(number)).exists():
        known[r.start] = Shard(**json_io.read_object(path, "delete it and run `record` again"))
    return {first: s for first, s in known.items() if is_there(self.folder, s)}

  def write_shard(self, sequences_of: range, sequences: Iterable[Record]) -> Shard:
    """Writes one whole shard. Returns when it is on disk and registered.

    Args:
      sequences_of: one of `missing()`.
      sequences: exactly that many dicts (see codec), in order.

    Raises:
      InputError: the range is not a planned shard, there are more or fewer sequences, the
        disk is full, or another writer registered other bytes for it.
    """
    ranges = self.manifest.ranges
    if sequences_of not in ranges:
      raise InputError(
        f"sequences {sequences_of.start} to {sequences_of.stop} are no shard of {self.folder}; "
        "write the ranges that missing() gives"
      )
    number = ranges.index(sequences_of)
    path = self.folder / manifest_lib.shard_name(number)
    part = self.folder / f".writing-{number:05d}-{self._process}"
    with _writing(path):
      part.unlink(missing_ok=True)
      totals = self._write(part, sequences_of, sequences)
      shard = Shard(
        name=path.name,
        first=sequences_of.start,
        count=len(sequences_of),
        bytes=part.stat().st_size,
        sha256=digest(part),
        **totals,
      )
      self._publish(part, path, shard, number)
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
          raise InputError(f"shard {part.name} was given more than {count} sequences")
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
      raise InputError(f"shard {part.name} was given {count} sequences, not {len(sequences_of)}")
    reader = array_record_module.ArrayRecordReader(str(part))
    if not reader.ok() or reader.num_records() != count:
      raise InputError(f"{part} was not written whole; is the disk full? Free space, run again")
    with part.open("rb") as f:
      os.fsync(f.fileno())
    return {"tokens": tokens, "targets": targets, "entries": entries, "fields": fields}

  def _publish(self, part: Path, path: Path, shard: Shard, number: int) -> None:
    # Another writer, with another process count, may have been here first.
    if (other := self.finished().get(shard.first)) is not None:
      part.unlink()
      if other.sha256 != shard.sha256:
        raise InputError(
          f"{path} was finished by another writer with digest {other.sha256[:12]}, this one made "
          f"{shard.sha256[:12]}; two recordings that differ are writing here, so stop one"
        )
      return
    part.replace(path)
    atomic_io.fsync_dir(self.folder)
    atomic_io.atomic_write(self._registration(number), json.dumps(dataclasses.asdict(shard)) + "\n")

  def _registration(self, number: int) -> Path:
    return self.folder / f"{manifest_lib.shard_name(number)}.json"

  def complete(self) -> Manifest | None:
    """Merges the registered shards into the manifest, if every planned one is there.

    Returns:
      The finished manifest, or None while another process still has shards to write.
    """
    shards = self.finished()
    if len(shards) < len(self.manifest.ranges):
      return None
    done = dataclasses.replace(self.manifest, shards=tuple(shards[k] for k in sorted(shards)))
    with _writing(self.folder):
      tfds_info.write(self.folder, done)
      done.save(self.folder)  # last: a folder whose manifest is whole is whole
      for stale in self.folder.glob(".writing-*"):
        stale.unlink(missing_ok=True)
    self.manifest = done
    return done

  def close(self) -> None:
    self._lock.close()  # and with it the lock

  def __enter__(self) -> Writer:
    return self

  def __exit__(self, *_) -> None:
    self.close()


def is_there(folder: Path, shard: Shard) -> bool:
  path = folder / shard.name
  return path.is_file() and path.stat().st_size == shard.bytes


def digest(path: Path) -> str:
  """The sha256 of a file, in hex."""
  with path.open("rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()


def _lock(path: Path) -> IO[str]:
  """Holds a file locked until it is closed; the kernel lets go when the process dies."""
  f = path.open("a+")
  try:
    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as e:
    f.seek(0)
    holder = f.read().strip() or "another process"
    f.close()
    raise InputError(
      f"{path.parent} is being written by {holder} now; wait for it, or stop it"
    ) from e
  f.truncate(0)
  f.write(f"process {os.getpid()}")
  f.flush()
  return f


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
  """What the system or array_record says about a failed write, as one sentence."""
  try:
    yield
  except InputError:
    raise
  except (OSError, RuntimeError) as e:
    why = getattr(e, "strerror", None) or str(e).split(";")[0]
    raise InputError(
      f"{path} cannot be written ({why}); free space or choose another folder, and run again: "
      "finished shards are kept"
    ) from e
