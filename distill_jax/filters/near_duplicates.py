"""Removes near-duplicates of earlier samples, found by MinHash with banding.

The similarity of two texts is the Jaccard similarity of their sets of n-grams of words. It equals
the probability that the two sets have the same minimum under a random hash (Broder, "On the
resemblance and containment of documents", 1997), and is estimated as the fraction of PERMUTATIONS
hashes with equal minima; the standard deviation is 0.04 at similarity 0.8. Only texts whose minima
agree in all ROWS hashes of at least one of the BANDS are compared. Two texts of similarity s are
compared with probability 1 - (1 - s^ROWS)^BANDS: 0.95 at s = 0.8, and 0.9998 at s = 0.9.

Memory: a signature is 512 bytes, in a file. Finding the texts to compare takes 24 bytes per text
while one band is sorted, and 12 bytes for each band of a text that agrees with another text; most
texts agree with none. If a tenth are near-duplicates, that is 107 bytes per text
(tools/bench/filter.py), or 0.9 GB for 8 million texts, whose signatures take 4 GB of disk.

Axes: N, the texts; S, the n-grams of a text; P, the permutations; E, pairs of a text and a band.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from distill_jax.errors import bad_value
from distill_jax.filters._base import ComparingFilter
from distill_jax.filters._ngrams import FACTOR, WORD, run_hashes, word_hashes
from distill_jax.filters.samples import Sample, prompt_text

BANDS, ROWS = 16, 8
PERMUTATIONS = BANDS * ROWS
OF = ("text", "prompt", "both")
PIECE = 2**16  # number of texts whose bands are hashed at a time


@dataclasses.dataclass(frozen=True)
class Filter(ComparingFilter):
  """Rejects texts that are nearly the same as an earlier one. It is the last in filter.order."""

  threshold: float = 0.8
  """Minimum similarity of near-duplicates, in [0.5, 1]. Below 0.7, many are missed."""
  ngram: int = 5
  """Length of the n-grams to compare, in words. Characters of Chinese and Japanese are words."""
  of: str = "text"
  """Part of the samples to compare: "text", "prompt" or "both". Samples of one prompt are compared
  with each other too, except for "prompt"."""

  def __post_init__(self):
    if not 0.5 <= self.threshold <= 1:
      raise bad_value("threshold", self.threshold, "a number in [0.5, 1]", "Correct it")
    if self.ngram < 1:
      raise bad_value("ngram", self.ngram, "a positive integer", "Increase it")
    if self.of not in OF:
      raise bad_value("of", self.of, f"one of {OF}", "Choose one of them")

  def signature(self, sample: Sample) -> np.ndarray:
    return signature(shingles(self._text(sample), self.ngram))

  def compare(
    self, signatures_NP: np.ndarray, prompts_N: np.ndarray, rows: np.ndarray
  ) -> Iterator[tuple[int, int, float]]:
    row_E, bucket_E = _buckets(signatures_NP, rows)
    # The kept texts of a bucket are a linked list: its last entry, and the entry before each one.
    last, before_E = np.full(bucket_E.max(initial=-1) + 1, -1, np.int32), np.full_like(row_E, -1)
    texts, starts = np.unique(row_E, return_index=True)
    stops = np.append(starts, len(row_E))[1:]
    for row, start, stop in zip(texts, starts, stops, strict=True):
      near = set()
      for bucket in bucket_E[start:stop]:
        entry = last[bucket]
        while entry >= 0:
          near.add(int(row_E[entry]))
          entry = before_E[entry]
      others = np.array(sorted(near), np.int64)
      if self.of == "prompt":
        others = others[prompts_N[others] != prompts_N[row]]
      similarity = np.mean(signatures_NP[others] == signatures_NP[row], axis=1)
      (found,) = np.nonzero(similarity >= self.threshold)
      if len(found):
        yield int(row), int(others[found[0]]), float(similarity[found[0]])
      else:
        before_E[start:stop] = last[bucket_E[start:stop]]
        last[bucket_E[start:stop]] = np.arange(start, stop)

  def reason(self, other: str, value: float) -> str:
    return f"near-duplicate: of {other}, similarity {value:.2f}"

  def _text(self, sample: Sample) -> str:
    parts = {"text": [sample["text"]], "prompt": [prompt_text(sample)]}
    return "\n".join(parts.get(self.of, [prompt_text(sample), sample["text"]]))


def shingles(text: str, n: int) -> np.ndarray:
  """Returns hashes of a text's different n-grams, or of all its words if there are fewer than n.

  The result is uint64 [S].
  """
  words = WORD.findall(text.casefold()) or [text.strip()]
  return np.unique(run_hashes(word_hashes(words), min(n, len(words))))


def signature(x_S: np.ndarray) -> np.ndarray:
  """Returns the MinHash signature of a set of n-grams, uint32 [PERMUTATIONS].

  Each hash is the high half of a·x + b modulo 2^64, with odd a.
  """
  factor_P, offset_P = _permutations()
  minima = [np.min(x_S * a + b) for a, b in zip(factor_P, offset_P, strict=True)]
  return (np.array(minima, np.uint64) >> np.uint64(32)).astype(np.uint32)


@functools.cache
def _permutations() -> tuple[np.ndarray, np.ndarray]:
  random = np.random.default_rng(0).integers(0, 2**64, (2, PERMUTATIONS), np.uint64)
  return random[0] | np.uint64(1), random[1]


def _buckets(signatures_NP: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns which texts agree in a band.

  Args:
    signatures_NP: The signatures of all texts.
    rows: The texts to compare.

  Returns:
    The text and the bucket of every entry, int32 [E], sorted by text. Each bucket has at least two
    texts, which agree in one band.
  """
  found, count = [(np.zeros(0, np.int32), np.zeros(0, np.int32))], 0
  for band in range(BANDS):
    hashes = np.empty(len(rows), np.uint64)
    for at in range(0, len(rows), PIECE):
      part = signatures_NP[rows[at : at + PIECE], band * ROWS : (band + 1) * ROWS]
      hashes[at : at + PIECE] = _mixed(part)
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    same = np.concatenate([[False], hashes[1:] == hashes[:-1]])
    shared = same | np.concatenate([same[1:], [False]])
    numbers = np.cumsum(~same[shared], dtype=np.int32) - 1 + count
    found.append((rows[order[shared]].astype(np.int32), numbers))
    count += int(np.sum(~same[shared]))
  row_E, bucket_E = (np.concatenate(parts) for parts in zip(*found, strict=True))
  order = np.argsort(row_E, kind="stable")
  return row_E[order], bucket_E[order]


def _mixed(x_NR: np.ndarray) -> np.ndarray:
  """Returns a hash of each row, uint64 [N]."""
  hashes = np.zeros(len(x_NR), np.uint64)
  for column in x_NR.T:
    hashes = (hashes ^ column) * FACTOR
    hashes ^= hashes >> np.uint64(29)
  return hashes
