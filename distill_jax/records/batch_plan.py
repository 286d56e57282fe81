"""The order in which the processes of a run record the rows of a corpus.

Each process that writes rows of a batch (sharding.Rows) has its own shards, and records them one
after the other in its rows of each batch. All processes compute the same plan, so that processes
that hold the same rows of a batch read the same rows of the corpus.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from distill_jax.nn.sharding import Rows

PADDING = -1  # the index of a row of a batch that records nothing


def divide(shards: Sequence[range], rows: Rows) -> dict[int, list[range]]:
  """Divides shards evenly among the processes that write.

  Args:
    shards: The ranges of sequences to record; the same on all processes.
    rows: The rows of a batch.

  Returns:
    The shards of each process, by its index.
  """
  writers = np.unique(rows.writer_B).tolist()
  return {p: list(shards[i :: len(writers)]) for i, p in enumerate(writers)}


def batches(shards: dict[int, list[range]], rows: Rows) -> Iterator[np.ndarray]:
  """Yields the index in the corpus of each row of each batch, int64 [B], or PADDING.

  The batches of a process lie within one shard each. Processes whose shards are finished continue
  on padding, because all compute together.

  Args:
    shards: The shards of each process, from `divide`.
    rows: The rows of a batch.
  """
  places = [np.flatnonzero(rows.writer_B == p) for p in shards]
  parts = [split(own, len(at)) for own, at in zip(shards.values(), places, strict=True)]
  for together in itertools.zip_longest(*parts, fillvalue=range(0)):
    index_B = np.full(rows.size, PADDING)
    for at, part in zip(places, together, strict=True):
      index_B[at[: len(part)]] = part
    yield index_B


def written(index_B: np.ndarray, rows: Rows) -> list[int]:
  """Returns the indices in the corpus of the rows of a batch that this process writes."""
  own = index_B[rows.written]
  return own[own != PADDING].tolist()


def split(shards: Sequence[range], size: int) -> Iterator[range]:
  """Cuts each shard into parts of at most `size` rows."""
  for shard in shards:
    for first in range(shard.start, shard.stop, size):
      yield range(first, min(first + size, shard.stop))
