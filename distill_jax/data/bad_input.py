"""Input that cannot be used: a run stops at the first, or skips and counts it (`*.on_bad`)."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict

from distill_jax.errors import InputError

ON_BAD = ("stop", "skip")
MAX_EXAMPLES = 3  # of those skipped for one reason


def check_on_bad(on_bad: str, statement: str) -> None:
  """Refuses a value of a key `on_bad`.

  Args:
    on_bad: the value.
    statement: what the error says of it, such as "data.on_bad is 'ignore'".
  """
  if on_bad not in ON_BAD:
    raise InputError(f"{statement}; it can be one of {ON_BAD}")


class BadInputPolicy:
  """Stops at input that cannot be used, or skips it and counts it by reason.

  Attributes:
    key: the config key that decides, for errors, such as "data.on_bad".
    stop: raise at the first.
    counts: how many were skipped, by reason.
    examples: by reason, where the first few of them are.
  """

  def __init__(self, key: str, on_bad: str):
    """Args:
    key: see the class.
    on_bad: the key's value.

    Raises:
      InputError: the value is not one of ON_BAD.
    """
    check_on_bad(on_bad, f"{key} is {on_bad!r}")
    self.key, self.stop = key, on_bad == "stop"
    self.counts: Counter[str] = Counter()
    self.examples: dict[str, list[str]] = defaultdict(list)

  def reject(self, where: str, reason: str) -> None:
    """Rejects the input at a place for a reason that is a sentence: "WHERE: REASON".

    Raises:
      InputError: the policy is to stop.
    """
    self._reject(where, f"{where}: {reason}", reason)

  def reject_subject(self, subject: str, predicate: str) -> None:
    """Rejects an input that is the subject of a sentence, "SUBJECT PREDICATE".

    Args:
      subject: the input, such as "data.jsonl, line 3".
      predicate: what is wrong, such as "has no text".

    Raises:
      InputError: the policy is to stop.
    """
    self._reject(subject, f"{subject} {predicate}", f"it {predicate}")

  def _reject(self, where: str, sentence: str, reason: str) -> None:
    if self.stop:
      raise InputError(f"{sentence}; mend it, or set {self.key}=skip")
    self.counts[reason] += 1
    if len(self.examples[reason]) < MAX_EXAMPLES:
      self.examples[reason].append(where)

  def report(self, source: str, used: int, units: str) -> None:
    """Prints on standard error what was skipped, a line for each reason.

    Args:
      source: what was read.
      used: how many inputs could be used.
      units: what they are, such as "examples".
    """
    skipped = self.counts.total()
    for reason, n in self.counts.most_common():
      where = ", ".join(self.examples[reason]) + (", …" if n > MAX_EXAMPLES else "")
      line = f"{source}: {n} of {used + skipped} {units} left out: {reason}: {where}"
      print(line, file=sys.stderr)
