"""Texts that are too short, too long, or cut off."""

from __future__ import annotations

import dataclasses

from distill_jax.errors import InputError
from distill_jax.filters._base import SampleFilter
from distill_jax.filters.samples import Sample, Unjudgeable


@dataclasses.dataclass(frozen=True)
class Filter(SampleFilter):
  """Rejects texts that are too short, too long, or cut off.

  Attributes:
    min_tokens, max_tokens: bounds of the number of tokens; max 0: none.
    min_chars, max_chars: bounds of the text; max 0: none.
    finished: a text that ended because there was no more room is rejected.
  """

  min_tokens: int = 0
  max_tokens: int = 0
  min_chars: int = 1
  max_chars: int = 0
  finished: bool = True

  def __post_init__(self):
    for low, high in ((self.min_tokens, self.max_tokens), (self.min_chars, self.max_chars)):
      if low < 0 or high < 0 or (high and high < low):
        raise InputError(f"lengths from {low} to {high} are empty; give a range, or 0 for no end")

  def reject_reason(self, sample: Sample) -> str | None:
    if self.finished and sample.get("reason") == "length":
      return "cut off"
    if self.min_tokens or self.max_tokens:
      tokens = sample.get("tokens")
      if not isinstance(tokens, list):
        return Unjudgeable(
          "no tokens: the sample does not hold them; set min_chars and max_chars instead"
        )
      if why := _out_of_range(len(tokens), self.min_tokens, self.max_tokens, "tokens"):
        return why
    return _out_of_range(len(sample["text"].strip()), self.min_chars, self.max_chars, "characters")


def _out_of_range(n: int, low: int, high: int, unit: str) -> str | None:
  if n < low:
    return f"too short: {n} {unit}, at least {low}"
  return f"too long: {n} {unit}, at most {high}" if high and n > high else None
