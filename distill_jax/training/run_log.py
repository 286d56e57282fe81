"""The output of a training run: metrics, progress, goodput, a profile on demand."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import jax

from distill_jax.errors import InputError
from distill_jax.runtime import distributed
from distill_jax.runtime.progress import Progress
from distill_jax.training.metric_writer import MetricsWriter

CLOCK = ("step_seconds", "tokens_per_second", "goodput")  # differ between two runs of one config


class Log:
  """Writes a row of metrics a step, each read once the next step is dispatched.

  A row is what the step measured, and the wall clock: `step_seconds`, `tokens_per_second` and
  `goodput`, the share of the time since the process began the run that went into steps, and not
  into compiling, waiting for data, or saving. A context manager.

  Args:
    began: when the process began the run, by `clock`.

  Attributes:
    last: the last row written.
  """

  def __init__(
    self,
    workdir: Path,
    start: int,
    steps: int,
    began: float,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._now = clock
    self.last: dict[str, float] = {}
    self._workdir, self._start, self._steps = workdir, start, steps
    self._began, self._mark, self._good = began, math.nan, 0.0
    self._pending: tuple[int, dict[str, jax.Array]] | None = None

  def __enter__(self) -> Log:
    with contextlib.ExitStack() as stack:
      self._progress = stack.enter_context(
        Progress("train", self._steps, "steps", start=self._start)
      )
      self._writer = None
      if distributed.is_process_0():
        self._writer = stack.enter_context(MetricsWriter(self._workdir, purge_step=self._start))
      self._open = stack.pop_all()
    return self

  def __exit__(
    self,
    error_type: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    self._open.__exit__(error_type, error, traceback)

  def step(self, n: int, metrics: dict[str, jax.Array]) -> None:
    """Keeps the metrics of a step, still being computed, and writes the row of the one before."""
    self.flush()
    self._pending = n, metrics

  def flush(self) -> None:
    """Writes the row still pending.

    Raises:
      FloatingPointError: its loss is not finite.
    """
    if self._pending is None:
      return
    (n, metrics), self._pending = self._pending, None
    row = {name: float(x) for name, x in jax.device_get(metrics).items()}
    if not math.isfinite(row["loss"]):
      raise FloatingPointError(
        f"the loss of step {n} is {row['loss']}; the last good checkpoint stays in "
        f"{self._workdir}; lower optim.peak_lr or look at the data of that step"
      )
    row |= self._clock(row["tokens"])
    if self._writer is not None:
      self._writer.write(n, row)
    self._progress.add(1, loss=row["loss"])
    self.last = row

  def saved(self) -> None:
    """Leaves the time since the last row, which went into saving, out of the next step's."""
    self._mark = self._now()

  def _clock(self, tokens: float) -> dict[str, float]:
    now = self._now()
    took, self._mark = now - self._mark, now
    if math.isnan(took):  # the first row of a process has its compilation in it
      return dict.fromkeys(CLOCK, 0.0)
    self._good += took
    goodput = self._good / (now - self._began)
    return dict(zip(CLOCK, (took, tokens / took, goodput), strict=True))


class Profile:
  """A trace of steps A to B-1, as "A:B" names them, for TensorBoard or xprof; "" makes none.

  Raises:
    InputError: "A:B" is anything else.
  """

  def __init__(self, steps: str, workdir: Path):
    self._folder, self._running = workdir / "profile", False
    first, _, last = (steps or "-1:-1").partition(":")
    try:
      self._first, self._last = int(first), int(last)
    except ValueError as e:
      raise InputError(f"profile_steps is {steps!r}; expected FIRST:END, e.g. 10:13") from e
    if steps and not 0 <= self._first < self._last:
      raise InputError(f"profile_steps is {steps!r}; FIRST is at least 0 and below END")

  def step(self, n: int) -> None:
    """Starts or stops the trace; called before step n is dispatched."""
    if n == self._first:
      jax.profiler.start_trace(str(self._folder))
      self._running = True
    if n == self._last:
      self.stop()

  def stop(self) -> None:
    if self._running:
      jax.profiler.stop_trace()
      self._running = False
