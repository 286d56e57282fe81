"""Writing of stores, by any number of processes that may be killed and resumed at any time.

A shard is written to the local disk under a hidden name, checked and synced, and then renamed, or
uploaded to the URL of the folder and deleted here. Its index is written (see shard_index.py), and
last it is registered (see registration.py). Registered shards are never written again. When all
planned shards are registered, `complete` merges them into the manifest and writes the files for
tfds.

Of S shards, each of P processes looks up S/P, and its disk holds at most the shard that is being
written. It starts with one listing of 3 S names, 1,000 per request, and S/P small reads: 15
requests and 80 reads for 5,000 shards and 64 processes. A shard costs a lookup and three uploads.
`complete` costs one listing and S small reads, 32 at once, in one process.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from distill_jax.errors import InputError, bad_value
from distill_jax.records import manifest as manifest_lib
from distill_jax.records import registration, tfds_info
from distill_jax.records.fields import Record
from distill_jax.records.manifest import Manifest, Shard
from distill_jax.records.shard_writer import ShardWriter, writing
from distill_jax.runtime import storage


class Writer:
  """Writer of the shards of one process. Use it as a context manager, or `close` it.

  Args:
    folder: The folder of the store, which is created if it does not exist. In the mirror of a URL
      (see runtime/storage.py), the store is at the URL, and the mirror holds unfinished shards.
    manifest: The manifest of this run, whose `extents` holds the total number of sequences. A
      folder with fewer sequences is extended; its finished shards are kept.
    process_index: Index of this process.
    process_count: Number of processes. Shard s is looked up by process s % process_count; any
      process may write it.

  Attributes:
    folder: The path or URL of the store.
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
    self._disk = Path(folder)  # where unfinished shards and the lock are
    self.folder = storage.location(folder)
    self._process = f"{process_index}-of-{process_count}"
    self._index, self._count = process_index, process_count
    with writing(self._disk):
      self._disk.mkdir(parents=True, exist_ok=True)
      self._lock = _lock(self._disk / f".lock-{self._process}")
    try:
      self.manifest = self._join(manifest)
    except BaseException:
      self.close()
      raise

  def _join(self, want: Manifest) -> Manifest:
    """Returns the manifest of the folder, created or extended for this run."""
    if (found := manifest_lib.find(self.folder)) is None:
      found = dataclasses.replace(want, extents=(want.total,), shards=())
    else:
      manifest_lib.require_same(want, found, self.folder)
      if want.total < found.total:
        raise InputError(
          f"{self.folder} holds {found.total} sequences, but this run records {want.total}. Stores "
          "can only be extended; choose another folder."
        )
      if want.total == found.total:
        return found
      found = dataclasses.replace(found, extents=(*found.extents, want.total - found.total))
    if self._index == 0:  # the others have made the same
      with writing(self.folder):
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
    with writing(self.folder):
      self.manifest = dataclasses.replace(self.manifest, extents=extents)
      self.manifest.save(self.folder)

  def missing(self) -> list[range]:
    """Returns the ranges of sequences that are not finished, of those that this process looks up.

    Registered shards whose files are missing or have another size are included.
    """
    ranges = self.manifest.ranges[self._index :: self._count]
    return [r for r in ranges if r.start not in self._finished]

  def finished(self) -> list[Shard]:
    """Returns the finished shards, of those that this process looks up, in order.

    They are registered, and their files exist.
    """
    return [self._finished[first] for first in sorted(self._finished)]

  @functools.cached_property
  def _finished(self) -> dict[int, Shard]:
    """The shards of `finished`, by first sequence."""
    numbers = range(self._index, len(self.manifest.ranges), self._count)
    return registration.find(self.folder, self.manifest, numbers)

  def write_shard(self, sequences_of: range, sequences: Iterable[Record]) -> Shard:
    """Writes a shard; returns when it is on disk and registered. See `ShardWriter.write`.

    Args:
      sequences_of: The range of sequences, one of `missing()`.
      sequences: The records of the range, in order; see codec.encode_targets.
    """
    shard = self.shard_writer().write(sequences_of, sequences)
    self._finished[shard.first] = shard
    return shard

  def shard_writer(self) -> ShardWriter:
    """Returns what writes the shards, which can be sent to another process of this command."""
    return ShardWriter(self._disk, self.folder, self.manifest, self._process)

  def complete(self) -> Manifest | None:
    """Merges the registered shards into the manifest, if all planned shards are registered.

    Any process may call it, also repeatedly.

    Returns:
      The finished manifest, or None while other processes still have shards to write.
    """
    numbers = range(len(self.manifest.ranges))
    shards = registration.find(self.folder, self.manifest, numbers)
    if len(shards) < len(self.manifest.ranges):
      return None
    done = dataclasses.replace(self.manifest, shards=tuple(shards[k] for k in sorted(shards)))
    with writing(self.folder):
      tfds_info.write(self.folder, done)
      done.save(self.folder)  # last, because it marks the folder as complete
      for stale in self._disk.glob(".writing-*"):
        stale.unlink(missing_ok=True)
    self.manifest = done
    return done

  def close(self) -> None:
    self._lock.close()  # releases the lock

  def __enter__(self) -> Writer:
    return self

  def __exit__(self, *_) -> None:
    self.close()


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
