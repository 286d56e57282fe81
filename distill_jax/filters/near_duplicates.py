"""Removes near-duplicates of earlier samples, found by MinHash with banding.

The similarity of two texts is the Jaccard similarity of their sets of n-grams of words. It equals
the probability that the two sets have the same minimum under a random hash (Broder, "On the
resemblance and containment of documents", 1997), and is estimated as the fraction of PERMUTATIONS
hashes with equal minima; the standard deviation is 0.04 at similarity 0.8. Only texts whose minima
agree in all ROWS hashes of at least one of the BANDS are compared. Two texts of similarity s are
compared with probability 1 - (1 - s^ROWS)^BANDS: 0.95 at s = 0.8, and 0.9998 at s = 0.9.

Axes: S, the n-grams of a text; P, the permutations.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator

import numpy as np

from distill_jax.errors import bad_value
from distill_jax.filters import _base
from distill_jax.filters.samples import Judged, Sample, prompt_text

BANDS, ROWS = 16, 8
PERMUTATIONS = BANDS * ROWS
OF = ("text", "prompt", "both")
WORD = re.compile(r"\w+")


@dataclasses.dataclass(frozen=True)
class Filter(_base.Filter):
  """Rejects texts that are nearly the same as an earlier one.

  It uses about 2 KB of memory per text.
  """

  threshold: float = 0.8
  """Minimum similarity of near-duplicates, in [0.5, 1]. Below 0.7, many are missed."""
  ngram: int = 5
  """Length of the n-grams to compare, in words."""
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

  def select(self, samples: Iterable[Sample]) -> Iterator[Judged]:
    bands: list[dict[bytes, list[int]]] = [{} for _ in range(BANDS)]
    kept: list[np.ndarray] = []
    names: list[tuple[int, int]] = []
    for sample in samples:
      print_P = signature(shingles(self._text(sample), self.ngram))
      keys = [print_P[i * ROWS : (i + 1) * ROWS].tobytes() for i in range(BANDS)]
      near = {n for band, key in zip(bands, keys, strict=True) for n in band.get(key, ())}
      reason = None
      for n in sorted(near):
        if self.of == "prompt" and names[n][0] == sample["id"]:
          continue
        similarity = float(np.mean(kept[n] == print_P))
        if similarity >= self.threshold:
          other = f"prompt {names[n][0]}, sample {names[n][1]}"
          reason = f"near-duplicate: of {other}, similarity {similarity:.2f}"
          break
      if reason is None:
        for band, key in zip(bands, keys, strict=True):
          band.setdefault(key, []).append(len(kept))
        kept.append(print_P)
        names.append((sample["id"], sample["sample"]))
      yield Judged(sample, reason)

  def _text(self, sample: Sample) -> str:
    parts = {"text": [sample["text"]], "prompt": [prompt_text(sample)]}
    return "\n".join(parts.get(self.of, [prompt_text(sample), sample["text"]]))


def shingles(text: str, n: int) -> set[bytes]:
  """Returns hashes (8 bytes each) of a text's n-grams; of all its words if there are fewer."""
  words = WORD.findall(text.casefold()) or [text.strip()]
  runs = (" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1)))
  raw = (run.encode("utf-8", "surrogatepass") for run in runs)
  return {hashlib.blake2b(run, digest_size=8).digest() for run in raw}


def signature(runs: set[bytes]) -> np.ndarray:
  """Returns the MinHash signature of a set of n-grams, uint32 [PERMUTATIONS].

  Each hash is the high half of a·x + b modulo 2^64, with odd a.
  """
  x_S1 = np.frombuffer(b"".join(sorted(runs)), np.uint64)[:, None]
  random = np.random.default_rng(0).integers(0, 2**64, (2, PERMUTATIONS), np.uint64)
  min_P = np.full(PERMUTATIONS, np.iinfo(np.uint32).max, np.uint32)
  for at in range(0, len(x_S1), 4096):
    hash_SP = x_S1[at : at + 4096] * (random[:1] | np.uint64(1)) + random[1:]
    min_P = np.minimum(min_P, (hash_SP >> np.uint64(32)).astype(np.uint32).min(0))
  return min_P
