"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, data: bytes | str) -> None:
  """Writes under another name, syncs and renames: on disk when this returns."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f".{path.name}.{os.getpid()}.part")
  with part.open("wb") as f:
    f.write(data.encode() if isinstance(data, str) else data)
    f.flush()
    os.fsync(f.fileno())
  part.replace(path)
  sync_folder(path.parent)


def write_json(path: Path, tree: Any) -> None:
  write_whole(path, json.dumps(tree, indent=1, sort_keys=True) + "\n")


def sync_folder(folder: Path) -> None:
  """Makes renames in a folder last through a power cut."""
  fd = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)
