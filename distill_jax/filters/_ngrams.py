"""Words of texts, and hashes of runs of words as numpy arrays.

Axes: S, the words of a text.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence

import numpy as np

FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplication by it loses no bit

# Chinese and Japanese, which have no spaces between words: each character is a word.
CJK = (
  r"\u3005-\u3007\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
  r"\U00020000-\U0003ffff"
)
WORD = re.compile(rf"(?=\w)[{CJK}]|[^\W{CJK}]+")


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
