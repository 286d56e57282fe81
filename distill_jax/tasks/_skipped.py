"""Examples that cannot be used: a run stops at the first, or counts them and says why."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict

from distill_jax.errors import InputError

ON_BAD = ("stop", "skip")
NAMED = 3  # of those left out for one reason


class LeftOut:
  """What is left out of a task's data: `left_out(where, why)` for each.

  Attributes:
    count: by why; of each, `first` are some of those left out.
  """

  def __init__(self, task: str, on_bad: str):
    """Args: task, its name, for what is said; on_bad, one of ON_BAD."""
    check_on_bad(task, on_bad)
    self._task, self._stop = task, on_bad == "stop"
    self.count: Counter[str] = Counter()
    self.first: dict[str, list[str]] = defaultdict(list)

  def __call__(self, where: str, why: str) -> None:
    """Raises: InputError: where on_bad is "stop"."""
    if self._stop:
      raise InputError(f"{where} {why}; mend it, or set on_bad='skip' of the task {self._task}")
    self.count[why] += 1
    if len(self.first[why]) < NAMED:
      self.first[why].append(where)

  def report(self, used: int) -> None:
    """Says on standard error what was left out of how many."""
    for why, n in self.count.most_common():
      total = used + self.count.total()
      some = ", ".join(self.first[why]) + (", …" if n > NAMED else "")
      print(f"{self._task}: {n} of {total} examples left out: it {why}: {some}", file=sys.stderr)
    if not used:
      raise InputError(f"{self._task}: none of its {self.count.total()} examples can be used")


def check_on_bad(task: str, on_bad: str) -> None:
  if on_bad not in ON_BAD:
    raise InputError(f"the task {task} has on_bad {on_bad!r}; it can be one of {ON_BAD}")
