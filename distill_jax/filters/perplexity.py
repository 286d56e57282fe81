"""Keeps texts whose perplexity under the teacher is in a range."""

from __future__ import annotations

import dataclasses
import math

from distill_jax.errors import bad_value
from distill_jax.filters._base import SampleFilter
from distill_jax.filters.samples import Sample, Unjudgeable, number_field


@dataclasses.dataclass(frozen=True)
class Filter(SampleFilter):
  """Rejects texts whose perplexity is out of range.

  The perplexity is exp(-m), with m the mean log-probability per token that the teacher had when it
  generated the text.
  """

  at_least: float = 1.0
  """Minimum perplexity. 1: no minimum, since a perplexity is at least 1."""
  at_most: float = 0.0
  """Maximum perplexity. 0: no maximum."""

  def __post_init__(self):
    if self.at_least < 0:
      raise bad_value("at_least", self.at_least, "0 or more", "Increase it")
    if self.at_most < 0 or 0 < self.at_most < self.at_least:
      expected = f"at least at_least ({self.at_least}), or 0 for no maximum"
      raise bad_value("at_most", self.at_most, expected, "Correct it")

  def reject_reason(self, sample: Sample) -> str | None:
    mean = number_field(sample, "logprob_mean")
    if isinstance(mean, Unjudgeable):
      return mean
    if mean > 1e-3:  # a log-probability is at most 0, up to rounding
      return Unjudgeable(f"invalid logprob_mean: it is {mean}, but a log-probability is at most 0")
    perplexity = max(1.0, math.exp(min(-mean, 700.0)))
    if perplexity < self.at_least:
      return f"perplexity too low: {perplexity:.3g}, minimum {self.at_least}"
    if self.at_most and perplexity > self.at_most:
      return f"perplexity too high: {perplexity:.3g}, maximum {self.at_most}"
    return None
