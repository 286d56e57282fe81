"""Hashes of runs of words, as numpy arrays.

Axes: S, the words of a text.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplication by it loses no bit


def word_hashes(words: Sequence[str]) -> np.ndarray:
  """Returns a hash of each word, uint64 [S]. It is the same in every process."""
  return np.fromiter(map(_hash, words), np.uint64, len(words))


@functools.lru_cache(2**16)
def _hash(word: str) -> int:
  raw = word.encode("utf-8", "surrogatepass")
  return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def run_hashes(word_hash_S: np.ndarray, n: int) -> np.ndarray:
  """Returns a hash of each run of `n` words, uint64 [max(0, S - n + 1)]."""
  count = max(0, len(word_hash_S) - n + 1)
  hashes = np.zeros(count, np.uint64)
  for k in range(n if count else 0):
    hashes = hashes * FACTOR + word_hash_S[k : k + count]
  return hashes
