"""Progress reports: a plain line every few seconds with the progress, rate and time left.

Lines go to standard error, because the last line of standard output is a JSON object with `--json`.
They are the same on a pipe as on a terminal.
"""

from __future__ import annotations

import collections
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from distill_jax.types import JsonObject

WINDOW = 12  # recent lines over which the rate is averaged, so that compile time drops out


class Progress:
  """Context manager that reports the progress of a long job.

  A line reads `record  12,288/65,536 tokens  18%  1,024 tokens/s  left 0m52s  loss 3.21`. The last
  line, printed when the block ends or raises, has the total time and the mean rate. A block that
  raises before any unit is done prints nothing.

  Args:
    verb: First word of the line, e.g. "train".
    total: Number of units in the whole job; None if it is not known.
    unit: Name of the units.
    start: Number of units done before this process started, for a resumed job. They do not count
      towards the rate.
    every: Minimum number of seconds between lines.
    brief: True to print nothing about a block that ends, without an error, before its first line
      is due.
    file: Where lines are written; None for standard error.
    clock: Returns a monotonic time in seconds.
  """

  shown = True  # False on all processes of a run except process 0

  def __init__(
    self,
    verb: str,
    total: int | None,
    unit: str = "tokens",
    start: int = 0,
    every: float = 5.0,
    brief: bool = False,
    file: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    self.verb, self.total, self.unit, self.every = verb, total, unit, every
    self.done = self._start_at = start
    self._brief, self._file, self._clock = brief, file, clock
    self._numbers: JsonObject = {}

  def __enter__(self) -> Progress:
    self._start = self._clock()
    self._lines = collections.deque([(self._start, self.done)], maxlen=WINDOW)
    return self

  def begin(self, doing: str) -> None:
    """Prints a line before the first unit, e.g. `train  0/64 steps  0%  compiles the step`.

    Args:
      doing: The work before the first unit, which may take minutes.
    """
    self._print(doing)

  def add(self, n: int, **numbers: Any) -> None:
    """Counts `n` units as done.

    Args:
      n: Number of units.
      **numbers: Values for the next line. They are converted to float only when the line is
        printed, so that device arrays do not block before.
    """
    self.done += n
    self._numbers.update(numbers)
    now = self._clock()
    if now - self._lines[-1][0] < self.every:
      return
    then, before = self._lines[0]
    self._lines.append((now, self.done))
    rate = (self.done - before) / (now - then) if now > then else 0.0
    rest = -1 if self.total is None else self.total - self.done
    left = _duration(rest / rate) if rate and rest >= 0 else "unknown"
    self._print_rate(rate, f"left {left}")

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    took = self._clock() - self._start
    is_first = len(self._lines) == 1
    if is_first and kind is not None and self.done == self._start_at:
      return  # the error is all that there is to report
    if is_first and kind is None and self._brief and took < self.every:
      return
    rate = (self.done - self._start_at) / took if took else 0.0
    self._print_rate(rate, f"{'stopped after' if kind else 'took'} {_duration(took)}")

  def _print_rate(self, rate: float, time_part: str) -> None:
    self._print(f"{_number(rate)} {self.unit}/s", time_part)

  def _print(self, *parts: str) -> None:
    if not self.shown:
      return
    of = "" if self.total is None else f"/{self.total:,}"
    share = f"{100 * self.done // self.total}%" if self.total else "100%"
    line = [
      self.verb,
      f"{self.done:,}{of} {self.unit}",
      *([share] if of else []),
      *parts,
      *(f"{name} {_number(value)}" for name, value in self._numbers.items()),
    ]
    print("  ".join(line), file=self._file or sys.stderr, flush=True)


def _duration(seconds: float) -> str:
  minutes, s = divmod(round(seconds), 60)
  hours, m = divmod(minutes, 60)
  return f"{hours}h{m:02}m" if hours else f"{m}m{s:02}s"


def _number(value: Any) -> str:
  """Returns a number with 3 significant digits, or as an integer with separators from 100 on."""
  x = float(value)
  if abs(x) >= 100 and x - x == 0:
    return f"{x:,.0f}"
  return f"{x:.3g}"
