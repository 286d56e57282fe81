"""Texts that say the same again and again (the rules of Gopher, arXiv:2112.11446, table A1)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Sequence

from distill_jax.errors import InputError
from distill_jax.filters._base import SampleFilter
from distill_jax.filters.samples import Sample


@dataclasses.dataclass(frozen=True)
class Filter(SampleFilter):
  """Rejects texts that repeat themselves.

  Attributes:
    lines: the largest share of lines that stand there before.
    ngram: words of a run …
    words: … and the largest share of words in runs that stand there before.
  """

  lines: float = 0.3
  ngram: int = 10
  words: float = 0.3

  def __post_init__(self):
    if not (0 <= self.lines <= 1 and 0 <= self.words <= 1 and self.ngram >= 1):
      raise InputError(
        f"lines is {self.lines}, words {self.words} and ngram {self.ngram}; shares are from 0 to 1 "
        "and a run has at least one word"
      )

  def reject_reason(self, sample: Sample) -> str | None:
    text = sample["text"]
    if sample.get("reason") == "repetition":
      return "stopped for repetition"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and (share := 1 - len(set(lines)) / len(lines)) > self.lines:
      return f"repeated lines: {share:.0%}"
    if (share := repeated(text.split(), self.ngram)) > self.words:
      return f"repeated words: {share:.0%} in runs of {self.ngram}"
    return None


def repeated(words: Sequence[Hashable], n: int) -> float:
  """The share of words that lie in a run of `n` seen before in the same text."""
  seen: Counter[tuple] = Counter()
  marked = [False] * len(words)
  for at in range(len(words) - n + 1):
    run = tuple(words[at : at + n])
    if seen[run]:
      marked[at : at + n] = [True] * n
    seen[run] += 1
  return sum(marked) / len(words) if words else 0.0
