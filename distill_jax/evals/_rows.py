"""What benchmarks share: their files, the fields of a row, and choices as files hold them."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill_jax.errors import InputError
from distill_jax.evals._base import BenchmarkRow, Choice
from distill_jax.hub.locate import locate
from distill_jax.runtime import json_io

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".csv")


def find(path: str, *packaged: str, other: str = "") -> list[Path]:
  """Finds the files of a benchmark.

  Args:
    path: as a config gives it.
    packaged: "NAME/FILE" inside installed packages, for an empty path.
    other: what to do where no package is known to have one.
  """
  if path.startswith("hub:"):
    raise InputError(f"{path} would be downloaded; download its file and name that in path")
  if not path and not packaged:
    raise InputError(f"the benchmark's path is empty and no package is known to hold it; {other}")
  try:
    files = [locate(p) for p in ([path] if path else [f"package:{p}" for p in packaged])]
  except InputError as e:
    raise InputError(f"{e}, or name the benchmark's file in its path") from e
  if files[0].is_dir():
    inside = sorted(p for p in files[0].iterdir() if p.name.endswith(ENDINGS))
    if not inside:
      raise InputError(
        f"{path} holds no file that ends in {', '.join(ENDINGS)}; name the benchmark's file"
      )
    return inside
  return files


def rows(file: Path) -> Iterator[tuple[str, bytes | BenchmarkRow]]:
  """Yields (its place, a row) for each row of a file; of .jsonl the raw line."""
  if not file.name.endswith(ENDINGS):
    raise InputError(f"{file} is none of {', '.join(ENDINGS)}; convert it to JSON lines")
  try:
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
  except (OSError, EOFError) as e:
    raise InputError(f"{file} cannot be read ({e}); fetch it again") from e
  if file.name.endswith((".jsonl", ".jsonl.gz")):
    for n, raw in enumerate(data.splitlines(), 1):
      if raw.strip():
        yield f"{file}, line {n}", raw
    return
  for n, row in enumerate(_csv_rows(file, data) if file.suffix == ".csv" else _list(file, data), 1):
    yield f"{file}, row {n}", row


def _csv_rows(file: Path, data: bytes) -> list[BenchmarkRow]:
  try:
    text = io.StringIO(data.decode("utf-8-sig"), newline="")
    return list(csv.DictReader(text, strict=True))
  except (ValueError, csv.Error) as e:
    raise InputError(f"{file} is damaged ({e}); fetch it again") from e


def _list(file: Path, data: bytes) -> list[BenchmarkRow]:
  try:
    rows = json_io.parse(data.removeprefix(codecs.BOM_UTF8))
  except InputError as e:
    raise InputError(f"{file} is damaged ({e}); fetch it again") from e
  if not isinstance(rows, list):
    raise InputError(f"{file} holds a JSON {type(rows).__name__}; it ought to be a list of rows")
  return rows


def parse(raw: bytes | BenchmarkRow) -> BenchmarkRow:
  """Parses a row, where it is still a line."""
  row = json_io.parse(raw, "it") if isinstance(raw, bytes) else raw
  if not isinstance(row, dict):
    raise InputError(f"it is a JSON {type(row).__name__}, and a row is an object")
  return row


def field(row: BenchmarkRow, *names: str) -> Any:
  """Returns the first of these fields that is there. No error quotes the contents of others."""
  for name in names:
    if row.get(name) is not None:
      return row[name]
  raise InputError(
    f"there is no field {' or '.join(map(repr, names))}, but {', '.join(map(repr, row)) or 'none'}"
  )


def text(row: BenchmarkRow, *names: str) -> str:
  """Returns a field that is text and not empty; numbers are taken as they are written."""
  value = field(row, *names)
  if isinstance(value, int | float) and not isinstance(value, bool):
    value = str(value)
  if not isinstance(value, str) or not value.strip():
    raise InputError(f"field {' or '.join(map(repr, names))} is empty or no text")
  return value


def make_choice(context: str, choices: Any, label: Any, joined: str = " ") -> Choice:
  """Makes a Choice.

  Args:
    choices: as files hold them: a list of texts, or {"text": [...], "label": [...]}.
    label: the right one: its place from 0 on, its letter, or its label beside the texts.
    joined: what joins a choice to the context.
  """
  names: Any = None
  if isinstance(choices, dict):
    choices, names = choices.get("text"), choices.get("label")
  if (
    not isinstance(choices, list)
    or len(choices) < 2
    or not all(isinstance(c, str) and c.strip() for c in choices)
  ):
    raise InputError("the choices are no list of at least two texts")
  at = -1
  if isinstance(names, list) and label in names:
    at = names.index(label)
  elif isinstance(label, str) and len(label.strip()) == 1 and label.strip() in LETTERS:
    at = LETTERS.index(label.strip())
  elif not isinstance(label, bool) and str(label).strip().isdecimal():
    at = int(label)
  if not 0 <= at < len(choices):
    raise InputError(f"the answer key {label!r:.40} is none of the {len(choices)} choices")
  lengths = tuple(map(len, choices))
  return Choice(context, tuple(joined + c for c in choices), lengths, at)
