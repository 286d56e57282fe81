"""Texts that are nearly those of an earlier sample: MinHash with banding.

The Jaccard similarity of two texts, of their sets of runs of words, is the chance that the two
sets have the same minimum under a random hash (Broder, "On the resemblance and containment of
documents", 1997): the share of PERMUTATIONS hashes in which they do, within 0.04 (one standard
deviation at 0.8). Only texts that agree in all hashes of a band are compared: two of similarity
s are with chance 1 - (1 - s^ROWS)^BANDS, 0.95 at 0.8, 0.9998 at 0.9.

Here S are the runs of words of a text, and P the permutations.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator

import numpy as np

from distill_jax.errors import InputError
from distill_jax.filters import _base
from distill_jax.filters.samples import Judged, Sample, prompt_text

BANDS, ROWS = 16, 8
PERMUTATIONS = BANDS * ROWS
OF = ("text", "prompt", "both")
WORD = re.compile(r"\w+")


@dataclasses.dataclass(frozen=True)
class Filter(_base.Filter):
  """Keeps the first of each kind. It remembers about 2 KB of each text.

  Attributes:
    threshold: the similarity from which on a text is a near-duplicate. Below 0.7 many are missed.
    ngram: words of a run.
    of: "text", "prompt" or "both". Samples of one prompt are compared too, but for "prompt".
  """

  threshold: float = 0.8
  ngram: int = 5
  of: str = "text"

  def __post_init__(self):
    if not 0.5 <= self.threshold <= 1 or self.ngram < 1 or self.of not in OF:
      raise InputError(
        f"threshold is {self.threshold}, ngram {self.ngram} and of {self.of!r}; the first is from "
        f"0.5 to 1, the second at least 1, the last one of {OF}"
      )

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
        alike = float(np.mean(kept[n] == print_P))
        if alike >= self.threshold:
          reason = f"near-duplicate: of prompt {names[n][0]}, sample {names[n][1]}, {alike:.2f}"
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
  """The runs of `n` words, 8 bytes each; all words are one run where there are fewer."""
  words = WORD.findall(text.casefold()) or [text.strip()]
  runs = (" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1)))
  raw = (run.encode("utf-8", "surrogatepass") for run in runs)
  return {hashlib.blake2b(run, digest_size=8).digest() for run in raw}


def signature(runs: set[bytes]) -> np.ndarray:
  """uint32 [PERMUTATIONS], the minimum of each hash: the high half of a·x + b modulo 2^64."""
  x_S1 = np.frombuffer(b"".join(sorted(runs)), np.uint64)[:, None]
  random = np.random.default_rng(0).integers(0, 2**64, (2, PERMUTATIONS), np.uint64)
  least_P = np.full(PERMUTATIONS, np.iinfo(np.uint32).max, np.uint32)
  for at in range(0, len(x_S1), 4096):
    hash_SP = x_S1[at : at + 4096] * (random[:1] | np.uint64(1)) + random[1:]
    least_P = np.minimum(least_P, (hash_SP >> np.uint64(32)).astype(np.uint32).min(0))
  return least_P
