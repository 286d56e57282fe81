"""Decides after which steps all processes save a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import numpy as np

from distill_jax.runtime import distributed
from distill_jax.training.options import TrainOptions

CHECK_SECONDS = 10.0  # between two questions to the clock of process 0, by its measured step time


class SaveSchedule:
  """A rule by steps, which every process knows, and one by minutes.

  Clocks of hosts differ, so that only process 0 reads its clock. About every 10 seconds it sends
  the others its decision and the number of the step at which it decides again. All of them
  therefore save at the same steps, and no other step waits for a message.

  Args:
    options: The options of `train`.
    start: The first step.
    clock: Returns a monotonic time in seconds.
  """

  def __init__(
    self, options: TrainOptions, start: int, clock: Callable[[], float] = time.monotonic
  ):
    self._options, self._now = options, clock
    self._saved = self._checked_at = clock()
    self._checked, self._next = start, start + 1

  def due(self, step: int, finish: Callable[[], None]) -> bool:
    """Returns True to save a checkpoint. Every process must call this after every step.

    Args:
      step: Number of steps that are done.
      finish: Waits until the step is computed: on CPUs, two programs that communicate at a time
        can block each other.
    """
    c = self._options
    due = c.checkpoint_minutes > 0 and step >= self._next and self._minutes_passed(step, finish)
    due |= step == c.steps or any(n and step % n == 0 for n in (c.checkpoint_every, c.keep_every))
    if due:
      self._saved = self._now()
    return due

  def _minutes_passed(self, step: int, finish: Callable[[], None]) -> bool:
    """Returns the decision of process 0, and sets the step of the next one."""
    if jax.process_count() > 1:
      finish()
    now = self._now()
    left = self._saved + 60 * self._options.checkpoint_minutes - now
    seconds_per_step = max(1e-3, (now - self._checked_at) / (step - self._checked))
    wait = CHECK_SECONDS if left <= 0 else min(CHECK_SECONDS, left)
    decision = np.array([left <= 0, max(1, wait / seconds_per_step)], np.int32)
    due, ahead = map(int, distributed.broadcast_from_process_0(decision))
    self._checked_at, self._checked, self._next = now, step, step + ahead
    return bool(due)
