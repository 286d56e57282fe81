"""Where a text ends before the model ends it: at a stop string, or where it runs in circles."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError

CIRCLES = 4  # turns that a run in circles has, at least


@dataclasses.dataclass(frozen=True)
class Stops:
  """Attributes:
  strings: a text ends before the first of them, wherever tokens are cut.
  repetition: a text ends once its last so many tokens are one run of them CIRCLES times or
    more; 0: never.
  """

  tokenizer: Tokenizer
  strings: tuple[str, ...] = ()
  repetition: int = 0

  def __post_init__(self):
    if not all(self.strings):
      raise InputError("generate.stop holds an empty string, which ends every text; leave it out")
    if 0 < self.repetition < CIRCLES or self.repetition < 0:
      raise InputError(
        f"generate.repetition is {self.repetition}; it is 0 (off) or at least {CIRCLES} tokens"
      )

  def first(self, tokens: Sequence[int], old: int) -> tuple[int, str] | None:
    """(how many tokens there are then, why) where the text ends, of more than `old`; or None."""
    ends = [
      (n, why)
      for n, why in (
        (self._string(tokens, old), "stop"),
        (self._circles(tokens, old), "repetition"),
      )
      if n
    ]
    return min(ends, default=None, key=lambda end: end[0])

  def text(self, tokens: Sequence[int]) -> str:
    """The text up to the first stop string."""
    text = self.tokenizer.decode(tokens)
    found = [i for s in self.strings if (i := text.find(s)) >= 0]
    return text[: min(found)] if found else text

  def _string(self, tokens: Sequence[int], old: int) -> int:
    if not self.strings:
      return 0
    # No token is less than a byte, but for those without text, such as a document's end.
    reach = max(len(s.encode()) for s in self.strings)
    first = max(0, old - reach - 8)
    holds = lambda n: any(s in self.tokenizer.decode(tokens[first:n]) for s in self.strings)
    if not holds(len(tokens)):
      return 0
    return next((n for n in range(old + 1, len(tokens) + 1) if holds(n)), 0)

  def _circles(self, tokens: Sequence[int], old: int) -> int:
    W = self.repetition
    if not W or len(tokens) < W:
      return 0
    first = max(0, old + 1 - W)
    some = np.asarray(tokens[first:])
    best = len(tokens) + 1
    for period in range(1, W // CIRCLES + 1):
      same = some[period:] == some[:-period]
      # The end of each stretch of W - period positions that equal those a period before.
      sums = np.concatenate([[0], np.cumsum(same)])
      need = W - period
      whole = np.flatnonzero(sums[need:] - sums[:-need] == need)
      if len(whole):
        best = min(best, first + int(whole[0]) + W)
    return best if best <= len(tokens) else 0
