"""Where a text ends before the model ends it: at a stop string, or where it repeats itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError

MIN_TURNS = 4  # of a repetition


@dataclasses.dataclass(frozen=True)
class Stops:
  """Finds the end of a text among its tokens.

  Attributes:
    strings: a text ends before the first of them, wherever tokens are cut.
    repetition: a text ends once its last so many tokens are one sequence, MIN_TURNS times or
      more; 0: never.
  """

  tokenizer: Tokenizer
  strings: tuple[str, ...] = ()
  repetition: int = 0

  def __post_init__(self):
    if not all(self.strings):
      raise InputError("generate.stop holds an empty string, which ends every text; leave it out")
    if 0 < self.repetition < MIN_TURNS or self.repetition < 0:
      raise InputError(
        f"generate.repetition is {self.repetition}; it is 0 (off) or at least {MIN_TURNS} tokens"
      )

  def first(self, tokens: Sequence[int], old: int) -> tuple[int, str] | None:
    """Finds the first end of a text after its first `old` tokens.

    Returns:
      (how many tokens the text has then, "stop" or "repetition"); None where it does not end.
    """
    ends = [
      (n, reason)
      for n, reason in (
        (self._stop_string(tokens, old), "stop"),
        (self._repetition(tokens, old), "repetition"),
      )
      if n is not None
    ]
    return min(ends, default=None, key=lambda end: end[0])

  def text(self, tokens: Sequence[int]) -> str:
    """The text up to the first stop string."""
    text = self.tokenizer.decode(tokens)
    starts = [i for s in self.strings if (i := text.find(s)) >= 0]
    return text[: min(starts)] if starts else text

  def _stop_string(self, tokens: Sequence[int], old: int) -> int | None:
    """The number of tokens, more than `old`, after which there is a stop string."""
    if not self.strings:
      return None
    # No token is less than a byte, but for those without text, such as a document's end.
    reach = max(len(s.encode()) for s in self.strings)
    first = max(0, old - reach - 8)

    def has_stop(n: int) -> bool:
      text = self.tokenizer.decode(tokens[first:n])
      return any(s in text for s in self.strings)

    if not has_stop(len(tokens)):
      return None
    return next((n for n in range(old + 1, len(tokens) + 1) if has_stop(n)), None)

  def _repetition(self, tokens: Sequence[int], old: int) -> int | None:
    """The number of tokens, more than `old`, of which the last `repetition` repeat themselves."""
    length = self.repetition
    if not length or len(tokens) < length:
      return None
    first = max(0, old + 1 - length)
    recent = np.asarray(tokens[first:])
    ends = []
    for period in range(1, length // MIN_TURNS + 1):
      same = recent[period:] == recent[:-period]
      # The end of each stretch of `needed` positions that equal those a period before.
      needed = length - period
      sums = np.concatenate([[0], np.cumsum(same)])
      stretches = np.flatnonzero(sums[needed:] - sums[:-needed] == needed)
      if len(stretches):
        ends.append(first + int(stretches[0]) + length)
    return min((n for n in ends if n <= len(tokens)), default=None)
