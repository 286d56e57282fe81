"""Background writing of shards."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from distill_jax.records.manifest import Shard
from distill_jax.records.writer import Writer


class ShardBuffer:
  """Context manager that collects records in order and writes full shards in the background.

  At most one shard is written while the next one is filled. The exit waits for the last write.
  After an error of writing, records are dropped; `check` raises the error.

  Args:
    writer: Writer of the store.
    shards: Ranges of sequences to write, from `Writer.missing`.
    on_error: Called when a shard cannot be written.
  """

  def __init__(self, writer: Writer, shards: Iterable[range], on_error: Callable[[], None]):
    self._writer, self._on_error = writer, on_error
    self._error: BaseException | None = None
    self._shards = deque(shards)
    self._records: list[dict[str, np.ndarray]] = []
    self._background = ThreadPoolExecutor(1)
    self._writing: Future[Shard] | None = None

  @property
  def unfinished(self) -> int:
    """Number of sequences of the shard that is being filled; 0 once all shards are full."""
    return len(self._shards[0]) if self._shards else 0

  def add(self, records: Sequence[dict[str, np.ndarray]]) -> None:
    """Adds the next records, which must not extend past the end of the current shard."""
    if self._error is not None:
      return
    self._records += records
    if not self._records or len(self._records) < self.unfinished:
      return
    self._wait()
    if self._error is not None:
      return
    full = self._shards.popleft()
    self._writing = self._background.submit(self._writer.write_shard, full, self._records)
    self._records = []

  def _wait(self) -> None:
    written, self._writing = self._writing, None
    if written is not None and (error := written.exception()) is not None:
      self._error = error
      self._on_error()

  def check(self) -> None:
    """Raises the error of the shard that could not be written."""
    if self._error is not None:
      raise self._error

  def __enter__(self) -> ShardBuffer:
    return self

  def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
    try:
      if error is None:
        self._wait()
    finally:
      self._background.shutdown()
