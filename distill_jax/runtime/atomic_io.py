"""Atomic file writes."""

from __future__ import annotations

import os
from pathlib import Path

from distill_jax.runtime import files


def atomic_write(path: Path, data: bytes | str) -> None:
  """Writes a file under a temporary name, syncs and renames it.

  The file has its old or its new contents at any moment, and is on disk when this returns.

  Args:
    path: The file. Missing folders are created.
    data: The contents; text is written as UTF-8.
  """
  with files.open_write(path) as f:
    f.write(data.encode() if isinstance(data, str) else data)
  fsync_dir(path.parent)


def fsync_dir(folder: Path) -> None:
  """Syncs a folder, so that renames in it survive a power failure."""
  fd = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)
