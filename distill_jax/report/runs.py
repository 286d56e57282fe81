"""Training runs as the report reads them, also while they are going."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from distill_jax.report import own_texts
from distill_jax.report.own_texts import OwnText
from distill_jax.report.results import MODELS
from distill_jax.runtime import json_io, storage
from distill_jax.training.best import Best
from distill_jax.training.metric_writer import FILE, read_metrics
from distill_jax.training.options import TrainOptions
from distill_jax.types import JsonObject

RECENT = 50  # the last steps, whose median time predicts the remaining time


@dataclasses.dataclass(frozen=True)
class ReportedRun:
  """A training run, read from its folder.

  Attributes:
    rows: The rows of metrics.jsonl; [] before the first step.
    config: config.json; {} if the run has not begun.
    versions: versions.json; {} if the run has not begun.
    own_texts: texts that the student has sampled, of a run of `on_policy`.
  """

  rows: Sequence[Mapping[str, float]]
  config: JsonObject
  versions: JsonObject
  own_texts: Sequence[OwnText] = ()

  @property
  def done(self) -> int:
    """The number of finished steps."""
    return int(self.rows[-1]["step"]) + 1 if self.rows else 0

  @property
  def total(self) -> int | None:
    """The number of steps of the whole run; None if it is unknown."""
    steps = self.config.get("train", {}).get("steps")
    return steps if isinstance(steps, int) and steps > 0 else None

  @property
  def is_finished(self) -> bool:
    """True if the run has ended. One of unknown length counts as finished once it has begun."""
    if self.best.ended:
      return True
    return self.done >= self.total if self.total is not None else bool(self.rows)

  @functools.cached_property
  def best(self) -> Best:
    """The best evaluation on held-out data by the run's train.best_metric."""
    known = self.config.get("train", {})
    keys = ("steps", "best_metric", "patience")
    options = TrainOptions(**{key: known[key] for key in keys if key in known})
    best = Best(options, {})
    for row in self.rows:
      if options.best_metric in row:
        best.see(int(row["step"]) + 1, row)
    return best

  @property
  def seconds_left(self) -> float | None:
    """The time of the remaining steps at the median speed of recent ones; None if unknown."""
    recent = [row.get("step_seconds", 0.0) for row in self.rows[-RECENT:]]
    known = [x for x in recent if x > 0]  # 0 in the first row of a process
    if not known or self.total is None:
      return None
    return max(self.total - self.done, 0) * statistics.median(known)

  @functools.cached_property
  def series(self) -> dict[str, np.ndarray]:
    """The metrics by name, each as an array [n, 2] of steps and values."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in self.rows:
      for key, value in row.items():
        found.setdefault(key, []).append((row["step"], value))
    return {key: np.array(pairs) for key, pairs in found.items() if key != "step"}


def read_runs(folders: Mapping[str, str | Path]) -> dict[str, ReportedRun]:
  """Reads runs: first those named in MODELS, in that order, then the others."""
  order = [*MODELS, *folders]
  return {name: _read_run(Path(folders[name])) for name in sorted(folders, key=order.index)}


def _read_run(folder: Path) -> ReportedRun:
  def read(name: str) -> JsonObject:
    path = storage.fetched(folder / name)
    return json_io.read_object(path, "restore the file") if path.is_file() else {}

  has_begun = storage.fetched(folder / FILE).is_file()
  rows = read_metrics(folder) if has_begun else []
  return ReportedRun(rows, read("config.json"), read("versions.json"), own_texts.read(folder))


def progress(run: ReportedRun) -> str:
  """Returns how far a run is, e.g. "step 320 of 1,000, about 2 h left at its speed"."""
  if not run.config and not run.rows:
    return "has not begun"
  total = f" of {run.total:,}" if run.total is not None else ""
  if run.best.ended and run.done != run.total:
    return f"stopped early after step {run.done:,}{total}; the best one was step {run.best.step:,}"
  if run.is_finished:
    return f"finished, {run.done:,} steps"
  left = run.seconds_left
  return f"step {run.done:,}{total}" + (
    f", about {duration(left)} left at its speed" if left else ""
  )


def duration(seconds: float) -> str:
  """Returns a time in the unit that fits, e.g. "40 s", "12 min", "3.5 h" or "2.1 days"."""
  if not math.isfinite(seconds):
    return "an unknown time"
  for unit, size, limit in (("s", 1.0, 120.0), ("min", 60.0, 7200.0), ("h", 3600.0, 172800.0)):
    if seconds < limit:
      x = seconds / size
      return f"{x:.0f} {unit}" if x >= 10 else f"{x:.2g} {unit}"
  return f"{seconds / 86400:.1f} days"
