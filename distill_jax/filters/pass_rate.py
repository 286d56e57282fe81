"""Removes prompts that are too easy or too hard, by the pass rate of their samples.

The pass rate of a prompt is the fraction of its samples that the earlier filters kept, so this
filter belongs after a filter that judges answers, e.g. `math`. A prompt without any kept sample has
a pass rate of 0 and nothing left to reject.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from distill_jax.errors import bad_value
from distill_jax.filters import _base
from distill_jax.filters.samples import Judged, Sample


@dataclasses.dataclass(frozen=True)
class Filter(_base.Filter):
  """Rejects all samples of a prompt whose pass rate is out of range, and writes `pass_rate`."""

  at_least: float = 0.0
  """Minimum pass rate, in [0, 1]."""
  at_most: float = 1.0
  """Maximum pass rate, in [at_least, 1]."""

  def __post_init__(self):
    if not 0 <= self.at_least <= 1:
      raise bad_value("at_least", self.at_least, "a fraction in [0, 1]", "Correct it")
    if not self.at_least <= self.at_most <= 1:
      expected = f"a fraction from at_least ({self.at_least}) to 1"
      raise bad_value("at_most", self.at_most, expected, "Correct it")

  def select(self, samples: Sequence[Sample]) -> Iterator[Judged]:
    passed, of = len(samples), samples[0]["of"]
    rate, why = passed / of, None
    if rate < self.at_least:
      why = f"too hard: {passed} of {of} passed"
    elif rate > self.at_most:
      why = f"too easy: {passed} of {of} passed"
    for sample in samples:
      yield Judged(sample | {"pass_rate": rate}, why)
