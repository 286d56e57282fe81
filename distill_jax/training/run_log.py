"""Outputs of a training run: metrics, progress, goodput, and an optional profile."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

import jax

from distill_jax.errors import bad_value
from distill_jax.runtime import distributed, storage
from distill_jax.runtime.progress import Progress
from distill_jax.training.metric_writer import MetricsWriter

OF_STEP = ("step_seconds", "tokens_per_second", "goodput")
CLOCK = (*OF_STEP, "generate_seconds", "score_seconds")  # not reproducible between runs


class Log:
  """Context manager that writes a row of metrics per step.

  The metrics of a step are read from the device after the next step is dispatched. A row also holds
  `step_seconds`, `tokens_per_second` and `goodput`: the fraction of the time since the process
  started the run that was spent in steps, not in compiling, waiting for data, evaluating or saving.

  Args:
    workdir: The folder of the run.
    start: The first step.
    steps: Total number of steps.
    began: Time at which the process started the run, by `clock`.
    clock: Returns a monotonic time in seconds.

  Attributes:
    last: The last row written.
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
    self._shown: dict[str, float] = {}  # the numbers of the last evaluation, for progress lines

  def __enter__(self) -> Log:
    with contextlib.ExitStack() as stack:
      self._progress = stack.enter_context(
        Progress("train", self._steps, "steps", start=self._start)
      )
      self._progress.begin("compiles the step")
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
    """Writes the row of the previous step, and keeps the metrics of this one.

    Args:
      n: The step number.
      metrics: Its metrics, which may still be in computation.
    """
    self.flush()
    self._pending = n, metrics

  def flush(self, evaluate: Callable[[], Mapping[str, float]] | None = None) -> None:
    """Writes the pending row.

    Args:
      evaluate: Returns further values of the row, on held-out data. Its time is not part of the
        time of a step.

    Raises:
      FloatingPointError: The loss or the gradient is not finite.
    """
    if self._pending is None:
      return
    (n, metrics), self._pending = self._pending, None
    row = {name: float(x) for name, x in jax.device_get(metrics).items()}
    if wrong := [name for name in ("loss", "grad_norm") if not math.isfinite(row[name])]:
      raise FloatingPointError(
        f"The {wrong[0]} of step {n} is {row[wrong[0]]}. The last good checkpoint is kept in "
        f"{self._workdir}. Lower optim.peak_lr, or check the data of that step."
      )
    row |= self._clock(row["tokens"])
    if evaluate is not None:
      row |= evaluate()
      self.saved()
      shown = "loss" if "heldout/loss" in row else "ce"  # see heldout.evaluate
      self._shown[f"held-out {shown}"] = row[f"heldout/{shown}"]
    if self._writer is not None:
      self._writer.write(n, row)
    self._progress.add(1, loss=row["loss"], **self._shown)
    self.last = row

  def saved(self) -> None:
    """Excludes the time since the last row, which was not spent on steps, from the next step."""
    if not math.isnan(self._mark):  # the first row of a process has no time
      self._mark = self._now()

  def _clock(self, tokens: float) -> dict[str, float]:
    now = self._now()
    took, self._mark = now - self._mark, now
    if math.isnan(took):  # the first row of a process includes compilation
      return dict.fromkeys(OF_STEP, 0.0)
    self._good += took
    goodput = self._good / (now - self._began)
    return dict(zip(OF_STEP, (took, tokens / took, goodput), strict=True))


class Profile:
  """A profiler trace of some steps, for TensorBoard or xprof.

  Args:
    steps: "A:B" to trace steps A to B - 1; "" for no trace.
    workdir: The folder of the run. The trace is written to its subfolder "profile".

  Raises:
    InputError: `steps` has another form.
  """

  def __init__(self, steps: str, workdir: Path):
    self._folder, self._running = workdir / "profile", False
    first, _, last = (steps or "-1:-1").partition(":")
    try:
      self._first, self._last = int(first), int(last)
    except ValueError as e:
      raise bad_value("profile_steps", steps, "FIRST:END, e.g. 10:13", "Correct it") from e
    if steps and not 0 <= self._first < self._last:
      expected = "FIRST:END with 0 <= FIRST < END"
      raise bad_value("profile_steps", steps, expected, "Correct it")

  def step(self, n: int) -> None:
    """Starts or stops the trace. Call it before step n is dispatched."""
    if n == self._first:
      jax.profiler.start_trace(str(self._folder))
      self._running = True
    if n == self._last:
      self.stop()

  def stop(self) -> None:
    """Stops the trace if it is running."""
    if self._running:
      jax.profiler.stop_trace()
      self._running = False
      for path in [path for path in self._folder.rglob("*") if path.is_file()]:
        storage.hand_over(path)
