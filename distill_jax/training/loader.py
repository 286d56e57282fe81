"""The loader: batch n is a function of (stores, seed, n), on any number of processes.

grain's datasets are read at random: shuffled, repeated and mixed, element i is known without
those before it. So there is no loader state to save: the position is the step.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from distill_jax.errors import InputError
from distill_jax.records.collate import Read, collate
from distill_jax.records.fields import Record
from distill_jax.records.store import RecordSource
from distill_jax.runtime import extras
from distill_jax.types import Batch, Recorded

with extras.needed("train"):
  import grain


def batches(
  stores: Sequence[RecordSource],
  *,
  batch_size: int,
  seed: int,
  start: int = 0,
  mixture: Sequence[float] = (),
  targets: bool = True,
  process_index: int = 0,
  process_count: int = 1,
  read: Read | None = None,
  recorded: Recorded | None = None,
) -> Iterator[Batch]:
  """This process's rows of every global batch from step `start` on, as numpy arrays.

  Args:
    stores: random access to records, all of one sequence length.
    batch_size: of the global batch; process p reads rows p, p + P, ... of it.
    seed: of the order; each epoch has its own.
    mixture: weights of the stores; empty: by size.
    targets: False ignores the recorded targets of "teacher", for one that runs in the step.
    read, recorded: see collate.

  Raises:
    InputError: the batch does not divide over the processes, or a store is empty.
  """
  if batch_size % process_count:
    raise InputError(f"batch size {batch_size} does not divide over {process_count} processes")
  if mixture and len(mixture) != len(stores):
    raise InputError(f"train.mixture has {len(mixture)} weights for {len(stores)} stores")
  if not all(len(store) for store in stores):
    raise InputError("a store holds no sequence; record it first")
  rows = [grain.MapDataset.source(store).shuffle(seed=seed).repeat() for store in stores]
  if targets and (empty_targets := _empty_targets([store[0] for store in stores])):
    add_missing = functools.partial(_add_missing_targets, empty_targets=empty_targets)
    rows = [ds.map(add_missing) for ds in rows]
  weights = list(mixture) or [len(store) for store in stores]
  ds = rows[0] if len(rows) == 1 else grain.MapDataset.mix(rows, weights=weights)
  to_batch = functools.partial(collate, with_targets=targets, read=read, recorded=recorded)
  ds = ds[process_index::process_count].batch(batch_size // process_count, batch_fn=to_batch)
  ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
  return iter(ds[start:].to_iter_dataset(ahead))


def _empty_targets(first: Sequence[Record]) -> Record:
  """Returns the fields of targets that only some of the stores hold, as zeros.

  Args:
    first: the first record of each store.
  """
  fields = {name: x for record in first for name, x in record.items()}
  if all(record.keys() == fields.keys() for record in first):
    return {}
  return {name: np.zeros_like(x) for name, x in fields.items()}


def _add_missing_targets(record: Record, empty_targets: Record) -> Record:
  return empty_targets | record
