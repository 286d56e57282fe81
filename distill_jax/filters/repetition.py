"""Removes texts that repeat themselves, by the rules of Gopher (arXiv:2112.11446, table A1)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Sequence

from distill_jax.errors import bad_value
from distill_jax.filters._base import SampleFilter
from distill_jax.filters.samples import Sample


@dataclasses.dataclass(frozen=True)
class Filter(SampleFilter):
  """Rejects texts that repeat themselves."""

  lines: float = 0.3
  """Maximum fraction of lines that repeat an earlier line, in [0, 1]."""
  ngram: int = 10
  """Length of a repeated run, in words."""
  words: float = 0.3
  """Maximum fraction of words in runs that repeat an earlier run, in [0, 1]."""

  def __post_init__(self):
    for key in ("lines", "words"):
      if not 0 <= (share := getattr(self, key)) <= 1:
        raise bad_value(key, share, "a fraction in [0, 1]", "Correct it")
    if self.ngram < 1:
      raise bad_value("ngram", self.ngram, "a positive integer", "Increase it")

  def reject_reason(self, sample: Sample) -> str | None:
    text = sample["text"]
    if sample.get("reason") == "repetition":
      return "stopped at a repetition"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and (share := 1 - len(set(lines)) / len(lines)) > self.lines:
      return f"repeated lines: {share:.0%}"
    if (share := repeated(text.split(), self.ngram)) > self.words:
      return f"repeated words: {share:.0%} in runs of {self.ngram}"
    return None


def repeated(words: Sequence[Hashable], n: int) -> float:
  """Returns the fraction of words that are in a run of `n` words which occurred earlier."""
  seen: Counter[tuple] = Counter()
  marked = [False] * len(words)
  for at in range(len(words) - n + 1):
    run = tuple(words[at : at + n])
    if seen[run]:
      marked[at : at + n] = [True] * n
    seen[run] += 1
  return sum(marked) / len(words) if words else 0.0
