"""Prompts that are too easy or too hard, by how many of their samples have come so far.

It belongs behind the filters that tell right from wrong. Of a prompt none of whose samples
came so far, nothing is left to reject.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from distill_jax.errors import InputError
from distill_jax.filters import _base
from distill_jax.filters.samples import Judged, Sample, by_prompt


@dataclasses.dataclass(frozen=True)
class Filter(_base.Filter):
  """Writes `pass_rate` into the samples.

  Attributes:
    at_least, at_most: bounds of the share of a prompt's samples, bounds included.
  """

  at_least: float = 0.0
  at_most: float = 1.0

  def __post_init__(self):
    if not 0 <= self.at_least <= self.at_most <= 1:
      raise InputError(
        f"pass rates from {self.at_least} to {self.at_most} are not a range between 0 and 1"
      )

  def select(self, samples: Iterable[Sample]) -> Iterator[Judged]:
    for group in by_prompt(samples):
      passed, of = len(group), group[0]["of"]
      rate, why = passed / of, None
      if rate < self.at_least:
        why = f"too hard: {passed} of {of} passed"
      elif rate > self.at_most:
        why = f"too easy: {passed} of {of} passed"
      for sample in group:
        yield Judged(sample | {"pass_rate": rate}, why)
