"""The data loader: batch n is a function of (stores, seed, n), for any number of processes.

A process reads the rows of it that its devices hold. The rows of a batch have one length. If the
stores have several, batches of each length have the same number of tokens, and the length of batch
n depends on the same three.

grain's datasets have random access: after shuffling, repeating and mixing, element i can still be
read without the elements before it. The loader therefore has no state to save except the step.

The elements are indices. The records of a batch are read all at once, by BATCHES_AHEAD batches
before they are needed, in THREADS threads. With a latency of 50 ms for a request to an object
store, a batch of 16 rows takes 50 ms and not 0.8 s, so that two threads read 40 batches per second;
a step of 2 s leaves 8 s for a batch that is slow.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from distill_jax.errors import InputError, bad_value
from distill_jax.records.collate import Read, collate, padding_like
from distill_jax.records.fields import Record
from distill_jax.records.store import RecordSource
from distill_jax.runtime import extras
from distill_jax.types import Batch, Recorded

with extras.needed("train"):
  import grain

THREADS, BATCHES_AHEAD = 2, 4
StoreIndex = tuple[int, int]  # the number of a store, and the index of a record in it


def batches(
  stores: Sequence[RecordSource],
  *,
  batch_size: int,
  seed: int,
  start: int = 0,
  mixture: Sequence[float] = (),
  targets: bool = True,
  lengths: Sequence[int] = (),
  held: Callable[[int], np.ndarray] | None = None,
  read: Read | None = None,
  recorded: Recorded | None = None,
) -> Iterator[Batch]:
  """Yields this process's rows of every global batch from step `start` on, as numpy arrays.

  Args:
    stores: Random-access sources of records.
    batch_size: Size of the global batch, in rows of the largest length.
    seed: Random seed of the order, which differs between epochs.
    start: The first step.
    mixture: Sampling weights of the stores, which are the shares of their tokens; empty for weights
      in proportion to their sizes.
    targets: False to ignore the recorded targets of "teacher", for an online teacher.
    lengths: The length of each store's rows; empty if all are equal.
    held: Returns the indices of the rows of a batch that this process holds (sharding.Rows), given
      the number of rows; None for all.
    read: See `collate`.
    recorded: See `collate`.

  Raises:
    InputError: `mixture` has another length than `stores`, a store is empty, or the lengths cannot
      be mixed.
  """
  if mixture and len(mixture) != len(stores):
    expected = f"{len(stores)} weights, one for each store"
    raise bad_value("train.mixture", mixture, expected, "Correct it")
  if not all(len(store) for store in stores):
    raise InputError("A record store is empty. Record it first.")
  lengths = lengths or [1] * len(stores)
  weights = list(mixture) or [len(store) for store in stores]
  shuffled = [
    grain.MapDataset.range(len(store)).shuffle(seed=seed).repeat().map(functools.partial(_pair, i))
    for i, store in enumerate(stores)
  ]
  by_length: dict[int, _OfLength] = {}
  for length, size in batch_sizes(lengths, batch_size).items():
    some = [i for i, n in enumerate(lengths) if n == length]
    by_length[length] = _OfLength(
      rows=_mix([shuffled[i] for i in some], [weights[i] for i in some]),
      size=size,
      own=list(range(size)) if held is None else held(size).tolist(),
      first=[stores[i].read_many([0])[0] for i in some],
      tokens=sum(weights[i] * (1 if mixture else length) for i in some),
    )
  if targets:
    _check_targets({length: of.first for length, of in by_length.items()})

  # Element n of the order is the length of batch n, and its number among batches of this length.
  batches_of_length = [
    grain.MapDataset.range(len(of.rows) // of.size).map(functools.partial(_pair, length))
    for length, of in by_length.items()
  ]
  order = _mix(batches_of_length, [of.tokens for of in by_length.values()])
  to_batch = functools.partial(collate, with_targets=targets, read=read, recorded=recorded)

  def batch(n: int) -> Batch:
    length, number = order[n]
    of = by_length[length]
    chosen = [of.rows[number * of.size + i] for i in of.own]
    return to_batch(_read(chosen, stores, of.empty_fields))

  return read_ahead(batch, range(start, len(order)))


@dataclasses.dataclass(frozen=True)
class _OfLength:
  """The rows of one length.

  Attributes:
    rows: The StoreIndex of all of them, in order.
    size: The number of rows of a batch.
    own: The rows of a batch that this process holds.
    first: The first record of each store.
    tokens: Their share of the tokens, relative to those of other lengths.
  """

  rows: grain.MapDataset
  size: int
  own: list[int]
  first: list[Record]
  tokens: float

  @functools.cached_property
  def empty_fields(self) -> Record:
    """See `_empty_fields`."""
    return _empty_fields(self.first)


def read_ahead(batch: Callable[[int], Batch], numbers: range) -> Iterator[Batch]:
  """Yields the batches of some numbers, which threads read before they are needed."""
  ahead = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=BATCHES_AHEAD)
  source = grain.MapDataset.range(numbers.start, numbers.stop).map(batch)
  return iter(source.to_iter_dataset(ahead))


def batch_sizes(lengths: Iterable[int], batch_size: int) -> dict[int, int]:
  """Returns the number of rows of a batch of each length, so that all have the same tokens.

  Args:
    lengths: Lengths of rows.
    batch_size: The number of rows of the largest length.

  Raises:
    InputError: A length does not divide the largest.
  """
  ascending = sorted(set(lengths)) or [1]
  if wrong := [n for n in ascending if ascending[-1] % n]:
    raise InputError(
      f"The stores have sequences of {ascending} tokens, but {wrong[0]} does not divide "
      f"{ascending[-1]}. Train on stores whose lengths divide the largest."
    )
  return {n: batch_size * ascending[-1] // n for n in ascending}


def _mix(datasets: Sequence[grain.MapDataset], weights: Sequence[float]) -> grain.MapDataset:
  return datasets[0] if len(datasets) == 1 else grain.MapDataset.mix(datasets, weights=weights)


def _check_targets(first: Mapping[int, Sequence[Record]]) -> None:
  """Raises InputError if the stores of a length lack targets that those of another have.

  Args:
    first: The first record of each store, by length.
  """
  fields = {n: {name for record in records for name in record} for n, records in first.items()}
  for n, names in fields.items():
    for other, more in fields.items():
      if missing := sorted(more - names):
        raise InputError(
          f"The stores with sequences of {n} tokens lack {missing[0]}, which those with sequences "
          f"of {other} tokens have. Record them with the same settings."
        )


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
    held: Indices of the rows of every batch that this process holds (sharding.Rows).
    targets: See `batches`.
    read: See `batches`.
    recorded: See `batches`.
    first: The first record of each store with the same sequence length, some of which may lack
      fields that others have.
  """
  empty_fields = _empty_fields(first)
  padding = padding_like(store.read_many([0])[0])
  to_batch = functools.partial(collate, with_targets=targets, read=read, recorded=recorded)

  def batch(n: int) -> Batch:
    own = [n * batch_size + i for i in held.tolist()]
    records = iter(store.read_many([i for i in own if i < len(store)]))
    return to_batch([empty_fields | (next(records) if i < len(store) else padding) for i in own])

  return read_ahead(batch, range(-(-len(store) // batch_size)))


def _pair(first: int, second: int) -> tuple[int, int]:
  return first, int(second)


def _read(
  chosen: Sequence[StoreIndex], stores: Sequence[RecordSource], empty_fields: Record
) -> Sequence[Record]:
  """Returns the rows of a batch, after reading those of each store at once.

  Args:
    chosen: The record of each row.
    stores: The stores.
    empty_fields: Fields that records without them get; see `_empty_fields`.
  """
  if len(stores) == 1 and not empty_fields:
    return stores[0].read_many([i for _, i in chosen])
  rows: dict[StoreIndex, Record] = {}
  for n, store in enumerate(stores):
    indices = [i for number, i in chosen if number == n]
    if indices:
      rows |= {(n, i): row for i, row in zip(indices, store.read_many(indices), strict=True)}
  return [empty_fields | rows[index] for index in chosen]


def _empty_fields(first: Sequence[Record]) -> Record:
  """Returns zeros for the fields, e.g. of targets, that are missing in some of the stores.

  Args:
    first: The first record of each store.
  """
  fields = {name: x for record in first for name, x in record.items()}
  if all(record.keys() == fields.keys() for record in first):
    return {}
  return {name: np.zeros_like(x) for name, x in fields.items()}
