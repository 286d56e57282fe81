"""The best evaluation of a run so far: which checkpoint to keep, and when to end early."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from distill_jax.errors import bad_value
from distill_jax.runtime import best_checkpoint
from distill_jax.training.options import TrainOptions
from distill_jax.types import JsonObject

PREFIX = "heldout/"
MAXIMISED = ("accuracy", "agreement")  # names, without a teacher or task
NOT_COMPARED = ("tokens", "entropy", "teacher_ce", "teacher_entropy")  # neither good nor bad


def comparable(names: Iterable[str]) -> list[str]:
  """Returns the metrics that order two models, with their prefix."""
  return [PREFIX + name for name in sorted(names) if _kind(name) not in NOT_COMPARED]


def of_benchmark(name: str) -> str:
  """Returns the metric of a benchmark, without the prefix."""
  return f"{name}/accuracy"


def is_maximised(metric: str, benchmarks: Iterable[str]) -> bool:
  """Returns whether more is better.

  Args:
    metric: The metric, with its prefix.
    benchmarks: The names in train.eval_benchmarks.
  """
  name = metric.removeprefix(PREFIX)
  return _kind(metric) in MAXIMISED or name in map(of_benchmark, benchmarks)


def _kind(metric: str) -> str:
  return metric.removeprefix(PREFIX).partition("/")[0]


class Best:
  """The best evaluation so far by train.best_metric.

  Its state is in the metadata of each checkpoint, so that a resumed run continues exactly.

  Args:
    options: The options of `train`.
    saved: The state in the last checkpoint, from best_checkpoint.read; {} at the start.

  Attributes:
    step: Number of steps after which the best evaluation was; None before the first one.
  """

  def __init__(self, options: TrainOptions, saved: JsonObject):
    self._metric, self._patience = options.best_metric, options.patience
    self._steps = options.steps
    self._sign = 1 if is_maximised(options.best_metric, options.eval_benchmarks) else -1
    self.step: int | None = saved.get("step")
    self._value = float(saved.get("value", math.nan))
    self._since = int(saved.get("since", 0))  # evaluations

  def see(self, step: int, row: Mapping[str, float]) -> None:
    """Takes note of an evaluation.

    Args:
      step: Number of steps that are done.
      row: Its values, by metric.
    """
    if not self._metric:
      return
    value, sign = row[self._metric], self._sign
    first = self.step is None and math.isfinite(value)
    if first or sign * value > sign * self._value:
      self.step, self._value, self._since = step, value, 0
    else:
      self._since += 1

  @property
  def ended(self) -> bool:
    """True if train.patience is exhausted."""
    return 0 < self._patience <= self._since

  @property
  def metadata(self) -> JsonObject:
    """The state, for the metadata of a checkpoint."""
    if self.step is None:
      return {}
    state = {"step": self.step, "value": self._value, "since": self._since}
    return {best_checkpoint.KEY: state | {"metric": self._metric}}

  def summary(self, step: int) -> JsonObject:
    """Returns the part of the result of a run of this number of steps."""
    if self.step is None:
      return {}
    return {
      "best_step": self.step,
      "best_value": self._value,
      "stopped_early": self.ended and step < self._steps,
    }


def check_metric(key: str, metric: str, names: Iterable[str]) -> None:
  """Raises InputError if a metric does not exist.

  Args:
    key: The config key that names it.
    metric: The metric, with its prefix; "" for none.
    names: The metrics of an evaluation, without the prefix.
  """
  known = comparable(names)
  if metric and metric not in known:
    raise bad_value(key, metric, f"one of {', '.join(known)}", "Correct it")
