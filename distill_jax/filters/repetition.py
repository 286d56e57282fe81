"""Removes texts that repeat themselves, by the rules of Gopher (arXiv:2112.11446, table A1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from distill_jax.errors import bad_value
from distill_jax.filters._base import SampleFilter
from distill_jax.filters._ngrams import run_hashes, word_hashes
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


def repeated(words: Sequence[str], n: int) -> float:
  """Returns the fraction of words that are in a run of `n` words which occurred earlier."""
  hashes = run_hashes(word_hashes(words), n)
  _, first = np.unique(hashes, return_index=True)
  if len(first) == len(hashes):
    return 0.0
  again = np.setdiff1d(np.arange(len(hashes)), first, assume_unique=True)
  starts_and_ends = np.zeros(len(words) + 1, np.int64)
  np.add.at(starts_and_ends, again, 1)
  np.add.at(starts_and_ends, again + n, -1)
  return float(np.mean(np.cumsum(starts_and_ends[:-1]) > 0))
