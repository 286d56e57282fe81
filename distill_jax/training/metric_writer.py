"""A run's numbers by step: metrics.jsonl, and event files for TensorBoard.

A row is {"step": 7, "loss": 3.21, ...}. JSON has no NaN or infinity, and a number that is
not there must not look like one that is null, so those three are written as the strings
"NaN", "Infinity" and "-Infinity"; `read_metrics` makes numbers of them again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import SupportsFloat

from distill_jax.errors import InputError
from distill_jax.runtime import extras, json_io
from distill_jax.runtime.atomic_io import atomic_write

with extras.needed("train"):
  from tensorboardX import SummaryWriter

FILE = "metrics.jsonl"


class MetricsWriter:
  """Appends rows to `dir`/metrics.jsonl and to TensorBoard event files beside it.

  Rows are flushed one at a time, so a killed process leaves half a line at most; opening
  drops it. A context manager.

  Args:
    dir: the run's folder; made when it is not there.
    purge_step: the step that a resumed run starts at. Rows from it on are cut, for that
      run writes them again, so no step appears twice. None keeps them all.

  Raises:
    InputError: a metrics.jsonl that this class did not write.
  """

  def __init__(self, dir: str | Path, purge_step: int | None = None):
    folder = Path(dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    self._last = _clean(path, purge_step)
    self._file = path.open("a", encoding="utf-8")
    # The library names files by the second and would write over an earlier one.
    suffix = f".{time.time_ns()}"
    self._events = SummaryWriter(str(folder), purge_step=purge_step, filename_suffix=suffix)

  def __enter__(self) -> MetricsWriter:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def write(self, step: int, numbers: Mapping[str, SupportsFloat]) -> None:
    """One row: all that is known of a step, each value anything that `float` takes.

    Raises:
      ValueError: the step is not after the last one.
    """
    if step <= self._last:
      raise ValueError(f"step {step} comes after step {self._last}: a step is written once")
    values = {name: float(x) for name, x in numbers.items()}
    row = {"step": int(step)} | {name: spell(x) for name, x in values.items()}
    self._file.write(json.dumps(row, allow_nan=False) + "\n")
    self._file.flush()
    for name, x in values.items():
      self._events.add_scalar(name, x, int(step))
    self._last = step

  def close(self) -> None:
    self._file.close()
    self._events.close()


def read_metrics(dir: str | Path) -> list[dict[str, float]]:
  """The rows of a run, in order; "step" is an int, all else floats.

  Half a line at the end, left by a killed writer, is passed over.

  Raises:
    InputError: no metrics.jsonl, or a line that is no row.
  """
  path = Path(dir) / FILE
  if not path.is_file():
    raise InputError(f"{path} is not there; name the folder of a training run")
  return [row for row, _ in _rows(path)]


def _rows(path: Path) -> list[tuple[dict[str, float], bytes]]:
  """(row, its line) of each whole line."""
  whole = path.read_bytes().split(b"\n")[:-1]  # what follows the last line end is half a line
  return [(_row(line, f"{path}, line {n}"), line + b"\n") for n, line in enumerate(whole, 1)]


def _row(line: bytes, where: str) -> dict[str, float]:
  try:
    row = json_io.parse_object(line)
    return {k: int(x) if k == "step" else float(x) for k, x in row.items()} | {"step": row["step"]}
  except (ValueError, TypeError, KeyError) as e:
    raise InputError(
      f"{where} is {line[:40]!r}, not a row of numbers with a step; move the file away"
    ) from e


def _clean(path: Path, purge_step: int | None) -> int:
  """Cuts half a line and the rows from `purge_step` on; returns the last step left, or -1."""
  if not path.is_file():
    return -1
  rows = _rows(path)
  kept = [(row, line) for row, line in rows if purge_step is None or row["step"] < purge_step]
  raw = b"".join(line for _, line in kept)
  if len(raw) != path.stat().st_size:
    atomic_write(path, raw)
  return int(kept[-1][0]["step"]) if kept else -1


def spell(x: float) -> float | str:
  """A float as strict JSON can hold it: NaN and the infinities as strings."""
  if math.isnan(x):
    return "NaN"
  return x if math.isfinite(x) else "Infinity" if x > 0 else "-Infinity"
