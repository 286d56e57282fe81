"""Texts that their teacher finds unlikely, or too likely to teach anything."""

from __future__ import annotations

import dataclasses
import math

from distill_jax.errors import InputError
from distill_jax.filters._base import SampleFilter
from distill_jax.filters.samples import Sample, Unjudgeable, number_field


@dataclasses.dataclass(frozen=True)
class Filter(SampleFilter):
  """exp(-mean log-probability a token), as the teacher gave it while it generated.

  Attributes:
    at_least, at_most: bounds; 1 is certainty; at_most 0: none.
  """

  at_least: float = 1.0
  at_most: float = 0.0

  def __post_init__(self):
    if self.at_least < 0 or self.at_most < 0 or (self.at_most and self.at_most < self.at_least):
      raise InputError(
        f"perplexities from {self.at_least} to {self.at_most} are empty; give a range, or at_most=0"
      )

  def reject_reason(self, sample: Sample) -> str | None:
    mean = number_field(sample, "logprob_mean")
    if isinstance(mean, Unjudgeable):
      return mean
    if mean > 1e-3:  # rounding aside, a probability is at most 1
      return Unjudgeable(f"no logprob_mean: it is {mean}, and a log-probability is not above 0")
    perplexity = max(1.0, math.exp(min(-mean, 700.0)))
    if perplexity < self.at_least:
      return f"perplexity too low: {perplexity:.3g}, at least {self.at_least}"
    if self.at_most and perplexity > self.at_most:
      return f"perplexity too high: {perplexity:.3g}, at most {self.at_most}"
    return None
