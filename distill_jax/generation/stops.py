"""End conditions of texts other than the model's end token: stop strings and repetition."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from distill_jax.data import token_bytes
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import bad_value

MIN_TURNS = 4  # minimum number of repetitions of a sequence that end a text


@dataclasses.dataclass(frozen=True)
class Stops:
  """Finds the end of a text in its tokens.

  Attributes:
    tokenizer: The tokenizer.
    strings: Stop strings. A text ends before the first of them, even within a token.
    repetition: The length of a loop, in tokens: a text ends once its last `repetition` tokens are
      one sequence repeated at least MIN_TURNS times. 0: off.
  """

  tokenizer: Tokenizer
  strings: tuple[str, ...] = ()
  repetition: int = 0

  def __post_init__(self):
    if not all(self.strings):
      raise bad_value(
        "generate.stop", self.strings, "strings that are not empty", "Remove the empty string"
      )
    if 0 < self.repetition < MIN_TURNS or self.repetition < 0:
      expected = f"0 (off) or at least {MIN_TURNS} tokens"
      raise bad_value("generate.repetition", self.repetition, expected, "Correct it")

  def first(self, tokens: Sequence[int], old: int) -> tuple[int, str] | None:
    """Finds the first end of a text after its first `old` tokens.

    Args:
      tokens: The tokens of the text.
      old: The number of tokens that earlier calls searched without finding an end.

    Returns:
      The number of tokens up to the end and the reason, "stop" or "repetition"; or None.
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
    """Returns the text of tokens up to the first stop string."""
    text = self._bytes_of(tokens)
    starts = [i for s in self.strings if (i := text.find(s.encode())) >= 0]
    return text[: min(starts, default=len(text))].decode(errors="replace")

  @functools.cached_property
  def _bytes_of(self) -> Callable[[Sequence[int]], bytes]:
    return token_bytes.joiner(self.tokenizer)

  def _stop_string(self, tokens: Sequence[int], old: int) -> int | None:
    """Returns the smallest number of tokens above `old` whose text has a stop string, or None."""
    if not self.strings:
      return None
    # A token has at least one byte, except for up to 8 tokens without text, e.g. a document's end.
    reach = max(len(s.encode()) for s in self.strings)
    first = max(0, old - reach - 8)

    def has_stop(n: int) -> bool:
      text = self._bytes_of(tokens[first:n])
      return any(s.encode() in text for s in self.strings)

    if not has_stop(len(tokens)):
      return None
    return next((n for n in range(old + 1, len(tokens) + 1) if has_stop(n)), None)

  def _repetition(self, tokens: Sequence[int], old: int) -> int | None:
    """Returns the smallest number of tokens above `old` at which a loop ends the text, or None."""
    length = self.repetition
    if not length or len(tokens) < length:
      return None
    first = max(0, old + 1 - length)
    recent = np.asarray(tokens[first:])
    ends = []
    for period in range(1, length // MIN_TURNS + 1):
      same = recent[period:] == recent[:-period]
      # Stretches of `needed` positions that equal the position one period before.
      needed = length - period
      sums = np.concatenate([[0], np.cumsum(same)])
      stretches = np.flatnonzero(sums[needed:] - sums[:-needed] == needed)
      if len(stretches):
        ends.append(first + int(stretches[0]) + length)
    return min((n for n in ends if n <= len(tokens)), default=None)
