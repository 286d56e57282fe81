"""Handling of inputs that cannot be used: stop at the first one, or skip and count (`*.on_bad`)."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict

from distill_jax.errors import InputError, bad_value

ON_BAD = ("stop", "skip")
MAX_EXAMPLES = 3  # number of places that are printed for each reason


class BadInputPolicy:
  """A policy for inputs that cannot be used: stop at the first, or skip them and count the reasons.

  Args:
    key: The config key of the policy, for messages, e.g. "data.on_bad".
    on_bad: The key's value.

  Attributes:
    key: See Args.
    stop: True to raise an error at the first input that cannot be used.
    counts: The number of skipped inputs, by reason.
    examples: The places of the first skipped inputs, by reason.

  Raises:
    InputError: If `on_bad` is not one of ON_BAD.
  """

  def __init__(self, key: str, on_bad: str):
    if on_bad not in ON_BAD:
      raise bad_value(key, on_bad, f"one of {ON_BAD}", "Choose one of them")
    self.key, self.stop = key, on_bad == "stop"
    self.counts: Counter[str] = Counter()
    self.examples: dict[str, list[str]] = defaultdict(list)

  def reject(self, where: str, reason: str) -> None:
    """Rejects an input with the message "WHERE: REASON".

    Args:
      where: The input's place, e.g. "data.jsonl, line 3".
      reason: A sentence.

    Raises:
      InputError: If the policy is to stop.
    """
    self._reject(where, f"{where}: {reason}", reason)

  def reject_subject(self, subject: str, predicate: str) -> None:
    """Rejects an input with the message "SUBJECT PREDICATE".

    Args:
      subject: The input's place, e.g. "data.jsonl, line 3".
      predicate: The problem as the predicate of a sentence, e.g. "has no text".

    Raises:
      InputError: If the policy is to stop.
    """
    self._reject(subject, f"{subject} {predicate}", f"It {predicate}")

  def _reject(self, where: str, sentence: str, reason: str) -> None:
    reason = f"{reason.rstrip('.')}."
    if self.stop:
      raise InputError(f"{sentence.rstrip('.')}. Correct it, or set {self.key}=skip.")
    self.counts[reason] += 1
    if len(self.examples[reason]) < MAX_EXAMPLES:
      self.examples[reason].append(where)

  def merge(self, other: BadInputPolicy) -> None:
    """Adds the counts and examples of inputs that come after those of this policy."""
    self.counts.update(other.counts)
    for reason, places in other.examples.items():
      self.examples[reason] = [*self.examples[reason], *places][:MAX_EXAMPLES]

  def report(self, source: str, used: int, units: str) -> None:
    """Prints the number of skipped inputs on standard error, one line per reason.

    Args:
      source: The name of the file or data set.
      used: The number of inputs that were used.
      units: The name of the inputs, e.g. "examples".
    """
    skipped = self.counts.total()
    for reason, n in self.counts.most_common():
      where = ", ".join(self.examples[reason]) + (", …" if n > MAX_EXAMPLES else "")
      line = f"{source}: {n} of {used + skipped} {units} skipped ({where}): {reason}"
      print(line, file=sys.stderr)
