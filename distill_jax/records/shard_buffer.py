"""Writing shards behind the computation that fills them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from distill_jax.records.manifest import Shard
from distill_jax.records.writer import Writer


class ShardBuffer:
  """Collects records in order and writes each shard in the background once it is full.

  Use as a context manager; its exit waits for the last write. At most one shard is being
  written while the next is filled.

  Args:
    writer: of the store.
    shards: the ranges to write, as `Writer.missing` returns them.
  """

  def __init__(self, writer: Writer, shards: Iterable[range]):
    self._writer = writer
    self._shards = deque(shards)
    self._records: list[dict[str, np.ndarray]] = []
    self._background = ThreadPoolExecutor(1)
    self._writing: Future[Shard] | None = None

  @property
  def unfinished(self) -> int:
    """Sequences of the shard that is not full yet; 0 once all shards are."""
    return len(self._shards[0]) if self._shards else 0

  def add(self, records: Sequence[dict[str, np.ndarray]]) -> None:
    """Adds the next records, none of them past the end of the shard that is being filled.

    Raises: whatever failed in the write of the shard before.
    """
    self._records += records
    if not self._records or len(self._records) < self.unfinished:
      return
    self._wait()
    full = self._shards.popleft()
    self._writing = self._background.submit(self._writer.write_shard, full, self._records)
    self._records = []

  def _wait(self) -> None:
    if self._writing is not None:
      self._writing.result()

  def __enter__(self) -> ShardBuffer:
    return self

  def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
    try:
      if error is None:
        self._wait()
    finally:
      self._background.shutdown()
