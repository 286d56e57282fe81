"""Reading of stores. A store is checked when it is opened, and each record when it is read."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, SupportsIndex, runtime_checkable

import numpy as np

from distill_jax.errors import InputError
from distill_jax.records import formats, shards, tf_example
from distill_jax.records import manifest as manifest_lib
from distill_jax.records.fields import Record
from distill_jax.records.manifest import Manifest, Shard, Taps
from distill_jax.records.stacked import Stacked
from distill_jax.records.writer import Writer
from distill_jax.runtime import files

if TYPE_CHECKING:  # reading a store must not import jax
  import grain

  from distill_jax.types import JsonObject

__all__ = ["Manifest", "RecordSource", "Shard", "Store", "Taps", "Writer", "open_store"]
POSITIONS_AT_ONCE = 8192  # positions that are decoded at once


@runtime_checkable
class RecordSource(Protocol):
  """A random-access source of records with the same fields."""

  def __len__(self) -> int:
    """Returns the number of records."""

  def read_many(self, indices: Sequence[int], /) -> Sequence[Record]:
    """Returns some records, in the order of their indices."""


class Store:
  """A finished store, as a random-access source of grain: `len(store)`, `store[i]`.

  `store[i]` is a dict of numpy arrays: tokens_T int32, segments_T int32 and mask_T bool (for a
  task, labels_T and mask_T), and the targets that `codec.decode_targets` returns. The shapes are
  equal for all i. A store can be pickled, and threads can share it.

  Args:
    folder: The folder or URL of the store.
    manifest: Its manifest.

  Attributes:
    folder: The folder or URL of the store.
    manifest: Its manifest.
  """

  def __init__(self, folder: str | Path, manifest: Manifest):
    self.folder, self.manifest = folder, manifest
    self._firsts = np.array([s.first for s in manifest.shards])
    self._shards = shards.open_shards(folder, manifest)

  def __len__(self) -> int:
    return self.manifest.total

  def __getitem__(self, index: SupportsIndex) -> Record:
    return self.read_many([index])[0]

  def read_many(self, indices: Sequence[SupportsIndex]) -> Stacked:
    """Returns the records of some indices. Records of a URL are read at once, not in turn.

    Raises:
      InputError: A record is damaged or cannot be read.
    """
    places = self._places([index.__index__() for index in indices])
    data, parts = self._shards.read(places), []
    for first in range(0, len(places), self._at_once):
      part = slice(first, first + self._at_once)
      parts.append(self._decode(places[part], data[part]))
    return Stacked.joined(parts)

  @property
  def _at_once(self) -> int:
    """Number of records that are decoded at once."""
    return max(1, POSITIONS_AT_ONCE // self.manifest.seq_len)

  def _places(self, indices: Sequence[int]) -> list[shards.Place]:
    """Returns the shard of each index, and the index."""
    total = len(self)
    for i in indices:
      if not 0 <= i < total:
        raise IndexError(f"Record {i} is not in a store of {total} records.")
    numbers = np.searchsorted(self._firsts, indices, side="right") - 1
    return [(self.manifest.shards[n], i) for n, i in zip(numbers.tolist(), indices, strict=True)]

  def _decode(self, places: Sequence[shards.Place], data: Sequence[bytes]) -> Stacked:
    """Decodes records at once; if that fails, one by one, so that the error names the record."""
    try:
      fields = tf_example.parse_many(data)
      return tf_example.decode_many([i for _, i in places], fields, self.manifest)
    except InputError as e:
      if len(places) > 1:
        alone = zip(places, data, strict=True)
        return Stacked.joined([self._decode([place], [record]) for place, record in alone])
      shard, i = places[0]
      raise InputError(
        f"{files.join(self.folder, shard.name)} is damaged at record {i} ({str(e).rstrip('.')}). "
        "Delete it and run `record` again."
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
        installed; or there are fewer examples than `batch_size`.
    """
    return formats.as_dataset(self, format, batch_size, seed, epochs)

  def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
    """Checks every shard's digest and decodes every record.

    Args:
      progress: Called after each record with the number of checked records and of all records.

    Raises:
      InputError: A shard or record is damaged.
    """
    for shard in self.manifest.shards:
      if (found := shards.digest(self.folder, shard)) != shard.sha256:
        raise InputError(
          f"{files.join(self.folder, shard.name)} has digest {found[:12]}; expected "
          f"{shard.sha256[:12]}. Delete it and run `record` again."
        )
      end = shard.first + shard.count
      for first in range(shard.first, end, self._at_once):
        stop = min(first + self._at_once, end)
        self.read_many(range(first, stop))
        for i in range(first, stop):
          if progress is not None:
            progress(i + 1, len(self))

  def __reduce__(self):
    return Store, (self.folder, self.manifest)


def unfinished_store(writer: Writer) -> Store:
  """Returns a store of the finished shards of a writer's process."""
  manifest = dataclasses.replace(writer.manifest, shards=tuple(writer.finished()))
  return Store(writer.folder, manifest)


def open_store(folder: str | os.PathLike[str], expect: JsonObject | None = None) -> Store:
  """Opens a finished store, after checking its manifest and the sizes of its files.

  The manifest and one listing of the folder are read, and no shard is opened. Records are read, and
  checked, when they are needed.

  Args:
    folder: The folder or URL that `record` or a Recorder wrote.
    expect: Expected values of manifest fields, e.g. {"tokenizer": digest, "vocab_size": V}. A
      string for "teacher" is its digest.

  Raises:
    InputError: The store is missing, damaged or unfinished, or a field differs from `expect`.
  """
  text = str(folder).removeprefix("file://")
  where: str | Path = text.rstrip("/") if files.is_remote(text) else Path(text)
  m = manifest_lib.load(where)
  for key, want in (expect or {}).items():
    if not hasattr(m, key):
      raise InputError(f"A manifest does not have the field {key!r}. Remove it from `expect`.")
    found = getattr(m, key)
    if key == "teacher" and isinstance(want, str):
      found = found.get("digest")
    if found != want:
      raise InputError(
        f"{where} has {key}={found!r}, but this run has {want!r}. Use the settings of the "
        "records, or record again."
      )
  planned = m.ranges
  if [range(s.first, s.first + s.count) for s in m.shards] != planned:
    raise InputError(
      f"{where} is not finished: it holds {len(m.shards)} of {len(planned)} shards. Run `record` "
      "again to finish it."
    )
  shards.check(where, m)
  return Store(where, m)
