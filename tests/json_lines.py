"""Reading and writing of files with one JSON value per line."""

import json
from collections.abc import Iterable
from pathlib import Path


def read_lines(path: Path) -> list:
  """Returns the values of a file, or of the files of a folder, which may be missing."""
  files = [path] if path.suffix == ".jsonl" else sorted(path.glob("*.jsonl"))
  lines = (line for file in files for line in file.read_text(encoding="utf-8").splitlines())
  return [json.loads(line) for line in lines]


def write_lines(path: Path, rows: Iterable) -> Path:
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
  return path
