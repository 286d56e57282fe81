"""The data loader: batch n is a function of (stores, seed, n), for any number of processes.

A process reads the rows of it that its devices hold.

grain's datasets have random access: after shuffling, repeating and mixing, element i can still be
read without the elements before it. The loader therefore has no state to save except the step.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from distill_jax.errors import InputError, bad_value
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
  held: np.ndarray | None = None,
  read: Read | None = None,
  recorded: Recorded | None = None,
) -> Iterator[Batch]:
  """Yields this process's rows of every global batch from step `start` on, as numpy arrays.

  Args:
    stores: Random-access sources of records with equal sequence lengths.
    batch_size: Size of the global batch.
    seed: Random seed of the order, which differs between epochs.
    start: The first step.
    mixture: Sampling weights of the stores; empty for weights in proportion to their sizes.
    targets: False to ignore the recorded targets of "teacher", for an online teacher.
    held: Indices of the rows of every batch that this process holds (sharding.Rows); None for all.
    read: See `collate`.
    recorded: See `collate`.

  Raises:
    InputError: `mixture` has another length than `stores`, or a store is empty.
  """
  if mixture and len(mixture) != len(stores):
    expected = f"{len(stores)} weights, one for each store"
    raise bad_value("train.mixture", mixture, expected, "Correct it")
  if not all(len(store) for store in stores):
    raise InputError("A record store is empty. Record it first.")
  rows = [grain.MapDataset.source(store).shuffle(seed=seed).repeat() for store in stores]
  if targets and (empty_targets := _empty_targets([store[0] for store in stores])):
    add_missing = functools.partial(_add_missing_targets, empty_targets=empty_targets)
    rows = [ds.map(add_missing) for ds in rows]
  weights = list(mixture) or [len(store) for store in stores]
  ds = rows[0] if len(rows) == 1 else grain.MapDataset.mix(rows, weights=weights)
  to_batch = functools.partial(collate, with_targets=targets, read=read, recorded=recorded)
  own = list(range(batch_size)) if held is None else held.tolist()

  def batch(n: int) -> Batch:
    return to_batch([ds[n * batch_size + i] for i in own])

  ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
  steps = grain.MapDataset.range(start, len(ds) // batch_size)
  return iter(steps.map(batch).to_iter_dataset(ahead))


def _empty_targets(first: Sequence[Record]) -> Record:
  """Returns zeros for the fields of targets that are missing in some of the stores.

  Args:
    first: The first record of each store.
  """
  fields = {name: x for record in first for name, x in record.items()}
  if all(record.keys() == fields.keys() for record in first):
    return {}
  return {name: np.zeros_like(x) for name, x in fields.items()}


def _add_missing_targets(record: Record, empty_targets: Record) -> Record:
  return empty_targets | record
