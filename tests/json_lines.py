"""Reading and writing of files with one JSON value per line."""

import json
from collections.abc import Iterable
from pathlib import Path


def read_lines(path: Path) -> list:
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, rows: Iterable) -> Path:
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
  return path
