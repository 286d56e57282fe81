"""The data loader: batch n is a function of (stores, seed, n), for any number of processes.

A process reads the rows of it that its devices hold.

grain's datasets have random access: after shuffling, repeating and mixing, element i can still be
read without the elements before it. The loader therefore has no state to save except the step.

The elements are indices. The records of a batch are read all at once, by BATCHES_AHEAD batches
before they are needed, in THREADS threads. With a latency of 50 ms for a request to an object
store, a batch of 16 rows takes 50 ms and not 0.8 s, so that two threads read 40 batches per second;
a step of 2 s leaves 8 s for a batch that is slow.
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

THREADS, BATCHES_AHEAD = 2, 4
Place = tuple[int, int]  # number of a store, and index of a record in it


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
  places = [
    grain.MapDataset.range(len(store)).shuffle(seed=seed).repeat().map(functools.partial(_place, n))
    for n, store in enumerate(stores)
  ]
  weights = list(mixture) or [len(store) for store in stores]
  ds = places[0] if len(places) == 1 else grain.MapDataset.mix(places, weights=weights)
  first = [store.read_many([0])[0] for store in stores] if targets else []
  read_rows = functools.partial(_read, stores=stores, empty_targets=_empty_targets(first))
  to_batch = functools.partial(collate, with_targets=targets, read=read, recorded=recorded)
  own = list(range(batch_size)) if held is None else held.tolist()

  def batch(n: int) -> Batch:
    return to_batch(read_rows([ds[n * batch_size + i] for i in own]))

  ahead = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=BATCHES_AHEAD)
  steps = grain.MapDataset.range(start, len(ds) // batch_size)
  return iter(steps.map(batch).to_iter_dataset(ahead))


def in_order(
  store: RecordSource,
  batch_size: int,
  *,
  held: np.ndarray,
  first: Sequence[Record] = (),
  targets: bool = True,
  read: Read | None = None,
  recorded: Recorded | None = None,
) -> Iterator[Batch]:
  """Yields this process's rows of batches of all records of a store, in order.

  Args:
    store: The store. Its last batch is padded with rows without labels.
    batch_size: Size of the global batch.
    held: See `batches`, as for `targets`, `read` and `recorded`.
    first: The first record of each store with the same sequence length, some of which may lack
      fields of targets that others have.
  """
  empty_targets = _empty_targets(first)
  padding = {name: np.zeros_like(x) for name, x in store.read_many([0])[0].items()}
  to_batch = functools.partial(collate, with_targets=targets, read=read, recorded=recorded)

  def batch(n: int) -> Batch:
    own = [n * batch_size + i for i in held.tolist()]
    records = iter(store.read_many([i for i in own if i < len(store)]))
    return to_batch([empty_targets | (next(records) if i < len(store) else padding) for i in own])

  ahead = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=BATCHES_AHEAD)
  numbers = grain.MapDataset.range(-(-len(store) // batch_size))
  return iter(numbers.map(batch).to_iter_dataset(ahead))


def _place(store: int, index: int) -> Place:
  return store, int(index)


def _read(
  places: Sequence[Place], stores: Sequence[RecordSource], empty_targets: Record
) -> list[Record]:
  """Returns the rows of a batch, after reading those of each store at once.

  Args:
    places: Number of the store, and index of the record in it, of each row.
    stores: The stores.
    empty_targets: Fields that records without them get; see `_empty_targets`.
  """
  rows: dict[Place, Record] = {}
  for n, store in enumerate(stores):
    indices = [i for number, i in places if number == n]
    if indices:
      rows |= {(n, i): row for i, row in zip(indices, store.read_many(indices), strict=True)}
  return [empty_targets | rows[place] for place in places]


def _empty_targets(first: Sequence[Record]) -> Record:
  """Returns zeros for the fields of targets that are missing in some of the stores.

  Args:
    first: The first record of each store.
  """
  fields = {name: x for record in first for name, x in record.items()}
  if all(record.keys() == fields.keys() for record in first):
    return {}
  return {name: np.zeros_like(x) for name, x in fields.items()}
