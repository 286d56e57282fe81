"""Helpers for benchmarks: finding and reading files, fields of a row, and choices."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill_jax.data import jsonl
from distill_jax.errors import InputError, bad_value
from distill_jax.evals._base import BenchmarkRow, Choice
from distill_jax.hub.locate import locate
from distill_jax.runtime import json_io

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ENDINGS = (*jsonl.SUFFIXES, ".json", ".csv")


def find(path: str, *packaged: str, other: str = "") -> list[Path]:
  """Returns the files of a benchmark.

  Args:
    path: The benchmark's config key `path`.
    packaged: "NAME/FILE" inside installed packages, used if the path is empty.
    other: The advice for an empty path if no package contains the benchmark, as an imperative.

  Raises:
    InputError: If there is no such file.
  """
  if path.startswith("hub:"):
    raise bad_value("path", path, "a local file", "Download the file and set path to it")
  if not path and not packaged:
    raise bad_value("path", path, "a file, since no package contains this benchmark", other)
  try:
    files = [Path(locate(p)) for p in ([path] if path else [f"package:{p}" for p in packaged])]
  except InputError as e:
    raise InputError(f"{str(e).rstrip('.')}. Or set `path` to the benchmark's file.") from e
  if files[0].is_dir():
    inside = sorted(p for p in files[0].iterdir() if p.name.endswith(ENDINGS))
    if not inside:
      expected = f"a folder with files that end in {', '.join(ENDINGS)}"
      raise bad_value("path", path, expected, "Set it to the benchmark's file")
    return inside
  return files


def rows(file: Path) -> Iterator[tuple[str, bytes | BenchmarkRow]]:
  """Yields (place, row) for each row of a file.

  The place is for messages, e.g. "FILE, line 3". The row of a .jsonl file is its raw line.

  Raises:
    InputError: If the file is damaged or not of a known format.
  """
  if not file.name.endswith(ENDINGS):
    raise bad_value("path", file, f"a file that ends in {', '.join(ENDINGS)}", "Convert the file")
  try:
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
  except (OSError, EOFError) as e:
    raise InputError(f"{file} cannot be read ({e}). Download it again.") from e
  if file.name.endswith(jsonl.SUFFIXES):
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
    raise InputError(f"{file} is damaged ({e}). Download it again.") from e


def _list(file: Path, data: bytes) -> list[BenchmarkRow]:
  try:
    rows = json_io.parse(data.removeprefix(codecs.BOM_UTF8))
  except InputError as e:
    why = str(e).rstrip(".")
    raise InputError(f"{file} is damaged ({why}). Download it again.") from e
  if not isinstance(rows, list):
    raise InputError(
      f"{file} contains a JSON {type(rows).__name__}. A .json benchmark must be a list of rows."
    )
  return rows


def parse(raw: bytes | BenchmarkRow) -> BenchmarkRow:
  """Returns a row of `rows`, with a raw line parsed as JSON.

  Raises:
    InputError: If the line is not a JSON object.
  """
  row = json_io.parse(raw, "The row") if isinstance(raw, bytes) else raw
  if not isinstance(row, dict):
    raise InputError(f"The row is a JSON {type(row).__name__}; expected an object.")
  return row


def field(row: BenchmarkRow, *names: str) -> Any:
  """Returns the first of the named fields that is present and not null.

  Raises:
    InputError: If all are missing. The message names the row's fields but never their contents.
  """
  for name in names:
    if row.get(name) is not None:
      return row[name]
  wanted = " or ".join(map(repr, names))
  has = ", ".join(map(repr, row)) or "no fields"
  raise InputError(f"The row has no field {wanted} (it has {has}).")


def text(row: BenchmarkRow, *names: str) -> str:
  """Returns the first of the named fields as text; a number is converted to text.

  Raises:
    InputError: If the field is missing, empty or not text.
  """
  value = field(row, *names)
  if isinstance(value, int | float) and not isinstance(value, bool):
    value = str(value)
  if not isinstance(value, str) or not value.strip():
    raise InputError(f"Field {' or '.join(map(repr, names))} is empty or not a text.")
  return value


def make_choice(context: str, choices: Any, label: Any, joined: str = " ") -> Choice:
  """Returns a multiple-choice question.

  Args:
    context: The text before a choice.
    choices: A list of texts, or {"text": [...], "label": [...]}.
    label: The correct choice: its index (from 0), its letter, or its entry in "label".
    joined: The separator between the context and a choice.

  Raises:
    InputError: If the choices are malformed, or the label is not one of them.
  """
  names: Any = None
  if isinstance(choices, dict):
    choices, names = choices.get("text"), choices.get("label")
  if (
    not isinstance(choices, list)
    or len(choices) < 2
    or not all(isinstance(c, str) and c.strip() for c in choices)
  ):
    raise InputError("The choices are not a list of at least two texts.")
  at = -1
  if isinstance(names, list) and label in names:
    at = names.index(label)
  elif isinstance(label, str) and len(label.strip()) == 1 and label.strip() in LETTERS:
    at = LETTERS.index(label.strip())
  elif not isinstance(label, bool) and str(label).strip().isdecimal():
    at = int(label)
  if not 0 <= at < len(choices):
    raise InputError(f"The answer key {label!r:.40} is not one of the {len(choices)} choices.")
  lengths = tuple(map(len, choices))
  return Choice(context, tuple(joined + c for c in choices), lengths, at)
