"""Metrics by step: metrics.jsonl, and event files for TensorBoard.

A row is {"step": 7, "loss": 3.21, ...}. JSON does not have NaN or infinity, and null would look
like a missing number. They are therefore written as the strings "NaN", "Infinity" and "-Infinity",
which `read_metrics` converts back to numbers.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import SupportsFloat

from distill_jax.errors import InputError
from distill_jax.runtime import extras, json_io, storage
from distill_jax.runtime.atomic_io import atomic_write

FILE = "metrics.jsonl"


class MetricsWriter:
  """Context manager that appends rows to `dir`/metrics.jsonl and to TensorBoard event files.

  Each row is flushed, so that a killed process leaves at most one incomplete line, which is removed
  when the file is opened again.

  Args:
    dir: The folder of the run, which is created if it does not exist.
    purge_step: The first step of a resumed run. Rows from this step on are removed, because the run
      writes them again. None to keep all rows.

  Raises:
    InputError: metrics.jsonl has another format.
  """

  def __init__(self, dir: str | Path, purge_step: int | None = None):
    with extras.needed("train"):  # imported here, because it imports torch where that is installed
      from tensorboardX import SummaryWriter
    folder = Path(dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = storage.fetched(folder / FILE)
    self._last = _clean(path, purge_step)
    self._file = path.open("a", encoding="utf-8")
    # tensorboardX names files by the second, and would overwrite a file of the same second.
    suffix = f".{time.time_ns()}"
    self._events = SummaryWriter(str(folder), purge_step=purge_step, filename_suffix=suffix)

  def __enter__(self) -> MetricsWriter:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def write(self, step: int, numbers: Mapping[str, SupportsFloat]) -> None:
    """Writes the row of a step.

    Args:
      step: The step number.
      numbers: Metrics by name, each a number that `float` accepts.

    Raises:
      ValueError: The step is not after the last one.
    """
    if step <= self._last:
      raise ValueError(f"Step {step} is not after step {self._last}; a step is written once.")
    values = {name: float(x) for name, x in numbers.items()}
    row = {"step": int(step)} | {name: spell(x) for name, x in values.items()}
    self._file.write(json.dumps(row, allow_nan=False) + "\n")
    self._file.flush()
    for name, x in values.items():
      self._events.add_scalar(name, x, int(step))
    self._last = step

  def close(self) -> None:
    """Closes the files."""
    self._file.close()
    self._events.close()


def read_metrics(dir: str | Path) -> list[dict[str, float]]:
  """Returns the rows of a run, in order. "step" is an int, other values are floats.

  An incomplete last line, left by a killed process, is skipped.

  Raises:
    InputError: metrics.jsonl does not exist, or a line has another format.
  """
  path = storage.fetched(Path(dir) / FILE)
  if not path.is_file():
    raise InputError(f"{path} does not exist. Name the folder of a training run.")
  return [row for row, _ in _rows(path)]


def _rows(path: Path) -> list[tuple[dict[str, float], bytes]]:
  """Returns (row, line) for each complete line."""
  whole = path.read_bytes().split(b"\n")[:-1]  # the rest is an incomplete line
  return [(_row(line, f"{path}, line {n}"), line + b"\n") for n, line in enumerate(whole, 1)]


def _row(line: bytes, where: str) -> dict[str, float]:
  try:
    row = json_io.parse_object(line)
    return {k: int(x) if k == "step" else float(x) for k, x in row.items()} | {"step": row["step"]}
  except (ValueError, TypeError, KeyError) as e:
    raise InputError(
      f"{where} is {line[:40]!r}, not a row of numbers with a step. Move the file away."
    ) from e


def _clean(path: Path, purge_step: int | None) -> int:
  """Removes an incomplete line and rows from `purge_step` on; returns the last step, or -1."""
  if not path.is_file():
    return -1
  rows = _rows(path)
  kept = [(row, line) for row, line in rows if purge_step is None or row["step"] < purge_step]
  raw = b"".join(line for _, line in kept)
  if len(raw) != path.stat().st_size:
    atomic_write(path, raw)
  return int(kept[-1][0]["step"]) if kept else -1


def spell(x: float) -> float | str:
  """Returns a float as strict JSON allows it, with NaN and infinities as strings."""
  if math.isnan(x):
    return "NaN"
  return x if math.isfinite(x) else "Infinity" if x > 0 else "-Infinity"
