"""A local file that is synced to disk while it is written."""

from __future__ import annotations

import io
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

SYNC_BYTES = 64 * 2**20  # that are written before the next sync begins


class SyncedFile(io.FileIO):
  """A new local file; a thread syncs it each time that SYNC_BYTES have been written."""

  def __init__(self, path: Path):
    self._unsynced = 0
    self._syncing: Future[None] | None = None
    self._background = ThreadPoolExecutor(1)
    super().__init__(path, "wb")

  def write(self, data: Any, /) -> int:
    count = super().write(data)
    self._unsynced += count
    if self._unsynced >= SYNC_BYTES and (self._syncing is None or self._syncing.done()):
      self._check()
      self._syncing = self._background.submit(os.fdatasync, self.fileno())
      self._unsynced = 0
    return count

  def sync(self) -> None:
    """Waits until the file is on disk."""
    self._check()
    os.fsync(self.fileno())

  def close(self) -> None:
    self._background.shutdown()
    super().close()

  def _check(self) -> None:
    """Raises the error of the last sync, since the system reports an error of a disk once."""
    if self._syncing is not None:
      self._syncing.result()
