"""Reading of stores. A store is checked when it is opened, and each record when it is read."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, SupportsIndex

import numpy as np
from array_record.python import array_record_module

from distill_jax.errors import InputError
from distill_jax.records import formats, tf_example
from distill_jax.records import manifest as manifest_lib
from distill_jax.records.fields import Record
from distill_jax.records.manifest import Manifest, Shard, Taps
from distill_jax.records.writer import Writer, digest

if TYPE_CHECKING:  # reading a store must not import jax
  import grain

  from distill_jax.types import JsonObject

__all__ = ["Manifest", "RecordSource", "Shard", "Store", "Taps", "Writer", "open_store"]


class RecordSource(Protocol):
  """A random-access source of records with the same fields."""

  def __len__(self) -> int:
    """Returns the number of records."""

  def __getitem__(self, index: int, /) -> Record:
    """Returns one record."""


class Store:
  """A finished store, as a random-access source of grain: `len(store)`, `store[i]`.

  `store[i]` is a dict of numpy arrays: tokens_T int32, segments_T int32 and mask_T bool (for a
  task, labels_T and mask_T), and the targets that `codec.decode_targets` returns. The shapes are
  equal for all i. A store can be pickled, and threads can share it.

  Attributes:
    folder: The folder of the store.
    manifest: Its manifest.
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
      raise IndexError(f"Record {i} is not in a store of {len(self)} records.")
    shard, data = self.read(i)
    try:
      return tf_example.decode(i, tf_example.parse(data), self.manifest)
    except InputError as e:
      raise InputError(
        f"{self.folder / shard.name} is damaged at record {i} ({str(e).rstrip('.')}). Delete it "
        "and run `record` again."
      ) from e

  def example(self, index: SupportsIndex) -> Record:
    """Returns a record as a training example: inputs, shifted targets, positions and segments.

    For packed text the arrays are inputs, inputs_position, inputs_segmentation, targets,
    targets_position, targets_segmentation and mask; for a task, labels and mask. The teacher's
    arrays are teacher_ids, teacher_weight and so on. See `formats.example`.
    """
    return formats.example(self[index], self.manifest)

  def as_dataset(
    self,
    format: str = "plain",
    *,
    batch_size: int | None = None,
    seed: int | None = None,
    epochs: int | None = 1,
  ) -> grain.MapDataset:
    """Returns the store as a grain dataset for a trainer.

    Args:
      format: "plain" for the dicts of `example`; "maxtext" for dicts with the keys of MaxText's
        loader, including top_k_indices and top_k_logits; "tunix" for Tunix's TrainingInput with
        positions, segment_ids and, as teacher_output, the top-k arrays; "batch" for the `Batch` of
        `fused_loss`.
      batch_size: Number of examples per batch; an incomplete last batch is dropped. None for single
        examples, with "plain" and "maxtext".
      seed: Random seed of the order, which differs between epochs; None for the order of the store.
      epochs: Number of passes over the store; None for endless repetition.

    Raises:
      InputError: The format is unknown, does not exist for a task, or needs a package that is not
        installed.
    """
    return formats.as_dataset(self, format, batch_size, seed, epochs)

  def read(self, i: int) -> tuple[Shard, bytes]:
    """Returns the shard of record i, and the encoded record.

    Raises:
      InputError: The shard is damaged.
    """
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
        f"{self.folder / shard.name} is damaged at record {i} ({str(e).split(';')[0]}). Delete it "
        "and run `record` again."
      ) from e

  def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
    """Checks every shard's digest and decodes every record.

    Args:
      progress: Called after each record with the number of checked records and of all records.

    Raises:
      InputError: A shard or record is damaged.
    """
    for shard in self.manifest.shards:
      if (found := digest(self.folder / shard.name)) != shard.sha256:
        raise InputError(
          f"{self.folder / shard.name} has digest {found[:12]}; expected {shard.sha256[:12]}. "
          "Delete it and run `record` again."
        )
      for i in range(shard.first, shard.first + shard.count):
        self[i]
        if progress is not None:
          progress(i + 1, len(self))

  def __reduce__(self):
    return Store, (self.folder, self.manifest)


def unfinished_store(writer: Writer) -> Store:
  """Returns a store of the finished shards of a store that is still being written."""
  finished = writer.finished()
  shards = tuple(finished[first] for first in sorted(finished))
  return Store(writer.folder, dataclasses.replace(writer.manifest, shards=shards))


def open_store(folder: str | os.PathLike[str], expect: JsonObject | None = None) -> Store:
  """Opens a finished store, after checking its manifest and the size and count of every shard.

  Args:
    folder: The folder or URL that `record` or a Recorder wrote. A URL is fetched to this machine.
    expect: Expected values of manifest fields, e.g. {"tokenizer": digest, "vocab_size": V}. A
      string for "teacher" is its digest.

  Raises:
    InputError: The store is missing, damaged or unfinished, or a field differs from `expect`.
  """
  if "://" in str(folder):
    from distill_jax.runtime import storage  # imports fsspec

    folder = storage.local(str(folder))
  folder = Path(folder)
  m = manifest_lib.load(folder)
  for key, want in (expect or {}).items():
    if not hasattr(m, key):
      raise InputError(f"A manifest does not have the field {key!r}. Remove it from `expect`.")
    found = getattr(m, key)
    if key == "teacher" and isinstance(want, str):
      found = found.get("digest")
    if found != want:
      raise InputError(
        f"{folder} has {key}={found!r}, but this run has {want!r}. Use the settings of the "
        "records, or record again."
      )
  planned = m.ranges
  if [range(s.first, s.first + s.count) for s in m.shards] != planned:
    raise InputError(
      f"{folder} is not finished: it holds {len(m.shards)} of {len(planned)} shards. Run `record` "
      "again to finish it."
    )
  for shard in m.shards:
    _reader(folder, shard)
  return Store(folder, m)


def _reader(folder: Path, shard: Shard) -> array_record_module.ArrayRecordReader:
  """Opens a shard and checks its size and count, because array_record opens damaged files."""
  path = folder / shard.name
  found = path.stat().st_size if path.is_file() else None
  if found != shard.bytes:
    fault = "is missing" if found is None else f"has {found} bytes; expected {shard.bytes}"
    action = "Run" if found is None else "Delete it and run"
    raise InputError(f"{path} {fault}. {action} `record` again.")
  try:
    reader = array_record_module.ArrayRecordReader(str(path), "readahead_buffer_size:0")
    count = reader.num_records() if reader.ok() else 0
  except (RuntimeError, ValueError) as e:
    raise InputError(f"{path} cannot be opened ({e}). Delete it and run `record` again.") from e
  if count != shard.count:
    raise InputError(
      f"{path} holds {count} records; expected {shard.count}. Delete it and run `record` again."
    )
  return reader
