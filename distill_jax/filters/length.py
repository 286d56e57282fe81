"""Keeps texts of a certain length."""

from __future__ import annotations

import dataclasses

from distill_jax.errors import bad_value
from distill_jax.filters._base import SampleFilter
from distill_jax.filters.samples import Sample, Unjudgeable


@dataclasses.dataclass(frozen=True)
class Filter(SampleFilter):
  """Rejects texts that are too short, too long, or cut off."""

  min_tokens: int = 0
  """Minimum number of generated tokens."""
  max_tokens: int = 0
  """Maximum number of generated tokens. 0: no maximum."""
  min_chars: int = 1
  """Minimum number of characters, without white space at both ends."""
  max_chars: int = 0
  """Maximum number of characters, without white space at both ends. 0: no maximum."""
  finished: bool = True
  """True to reject texts that were cut off at the maximum length."""

  def __post_init__(self):
    for unit in ("tokens", "chars"):
      low, high = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
      if low < 0:
        raise bad_value(f"min_{unit}", low, "0 or more", "Increase it")
      if high < 0 or 0 < high < low:
        raise bad_value(
          f"max_{unit}", high, f"at least min_{unit} ({low}), or 0 for no maximum", "Correct it"
        )

  def reject_reason(self, sample: Sample) -> str | None:
    if self.finished and sample.get("reason") == "length":
      return "cut off"
    if self.min_tokens or self.max_tokens:
      tokens = sample.get("token_count")
      if not isinstance(tokens, int):
        return Unjudgeable(
          "no tokens: the sample has no field 'token_count'; set min_chars and max_chars instead"
        )
      if why := _out_of_range(tokens, self.min_tokens, self.max_tokens, "tokens"):
        return why
    return _out_of_range(len(sample["text"].strip()), self.min_chars, self.max_chars, "characters")


def _out_of_range(n: int, low: int, high: int, unit: str) -> str | None:
  if n < low:
    return f"too short: {n} {unit}, minimum {low}"
  return f"too long: {n} {unit}, maximum {high}" if high and n > high else None
