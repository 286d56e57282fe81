"""Writing of one shard of a store: the file, its index, and its registration, in this order."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from array_record.python import array_record_module

from distill_jax.errors import InputError
from distill_jax.records import codec, registration, shard_index, tf_example
from distill_jax.records import manifest as manifest_lib
from distill_jax.records.fields import Record
from distill_jax.records.manifest import Manifest, Shard
from distill_jax.runtime import atomic_io, files


def array_record_options(seq_len: int) -> str:
  """Returns the options of array_record for records of `seq_len` positions.

  Long records have one chunk each, for random access, without compression, because their bits are
  already packed. Short records consist mostly of field names, so 64 of them share a compressed
  chunk: a record of one label with ten classes takes 36 instead of 285 bytes, and reading is as
  fast.
  """
  indexed = shard_index.has_index(seq_len)
  return "group_size:1,uncompressed" if indexed else "group_size:64,zstd:1"


@dataclasses.dataclass(frozen=True)
class ShardWriter:
  """Writes shards of a store whose folder this command has locked; see `Writer`.

  Several processes of the command may write different shards at the same time.

  Attributes:
    disk: The local folder for unfinished shards.
    folder: The path or URL of the store.
    manifest: The manifest of the store.
    process: The name of the command's process in the names of unfinished shards.
  """

  disk: Path
  folder: str
  manifest: Manifest
  process: str

  def write(self, sequences_of: range, sequences: Iterable[Record]) -> Shard:
    """Writes a shard; returns when it is on disk and registered.

    Args:
      sequences_of: The range of sequences, one of the manifest's.
      sequences: The records of the range, in order; see codec.encode_targets. They are read to
        their end before the shard is registered.

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
    name = manifest_lib.shard_name(number)
    part = self.disk / f".writing-{number:05d}-{self.process}"
    with writing(files.join(self.folder, name)):
      part.unlink(missing_ok=True)
      totals = self._write(part, sequences_of, sequences)
      index = self._index_of(part, len(sequences_of))
      shard = Shard(
        name=name,
        first=sequences_of.start,
        count=len(sequences_of),
        bytes=part.stat().st_size,
        sha256=digest(part),
        **totals,
      )
      self._publish(part, shard, number, index)
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

  def _index_of(self, part: Path, count: int) -> bytes | None:
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

  def _publish(self, part: Path, shard: Shard, number: int, index: bytes | None) -> None:
    path = files.join(self.folder, shard.name)
    # A writer with another process count may have registered this shard.
    if (other := registration.find_one(self.folder, number)) is not None:
      part.unlink()
      if other.sha256 != shard.sha256:
        raise InputError(
          f"{path} was finished by another writer with digest {other.sha256[:12]}, but this writer "
          f"has digest {shard.sha256[:12]}. Stop one of the two recordings."
        )
      return
    if files.is_remote(self.folder):
      files.upload(part, path)
      part.unlink()
    else:
      part.replace(path)
      atomic_io.fsync_dir(self.disk)
    if index is not None:
      files.write(files.join(self.folder, shard_index.name_of(shard.name)), index)
    registration.write(self.folder, number, shard)


def digest(path: Path) -> str:
  """Returns the sha256 of a file, in hex."""
  with path.open("rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
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
