"""Keeps pseudo-labels that the teacher is confident of.

The prompts ask for the label of an unlabelled text, and the samples are the teacher's outputs. The
filter writes the fields `label` and `confidence`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from distill_jax.errors import bad_value
from distill_jax.filters import _base
from distill_jax.filters.exact import plain
from distill_jax.filters.samples import Judged, Sample, Unjudgeable, answer_part, number_field

BY = ("probability", "agreement")


@dataclasses.dataclass(frozen=True)
class Filter(_base.Filter):
  """Rejects labels below a minimum confidence, and writes `label` and `confidence`."""

  labels: tuple[str, ...] = ()
  """Possible labels. Case, white space and a final full stop are ignored."""
  confidence: float = 0.9
  """Minimum confidence, in [0, 1]."""
  by: str = "probability"
  """Definition of the confidence: "probability", the teacher's probability of the whole output, or
  "agreement", the field that the filter `votes` writes with of="text"."""

  def __post_init__(self):
    if len({plain(label) for label in self.labels}) != len(self.labels):
      raise bad_value("labels", self.labels, "different labels", "Name each one once")
    if self.by not in BY:
      raise bad_value("by", self.by, f"one of {BY}", "Choose one of them")
    if not 0 <= self.confidence <= 1:
      raise bad_value("confidence", self.confidence, "a number in [0, 1]", "Correct it")

  def prepare(self) -> str:
    if not self.labels:
      raise bad_value("labels", self.labels, "the possible labels", "Name at least one")
    return ""

  def select(self, samples: Sequence[Sample]) -> Iterator[Judged]:
    return (self._judged(sample) for sample in samples)

  def _judged(self, sample: Sample) -> Judged:
    output = plain(answer_part(sample["text"]))
    label = next((label for label in self.labels if plain(label) == output), None)
    if label is None:
      return Judged(sample, f"not a label: {output!r:.80}")
    value = number_field(sample, "logprob" if self.by == "probability" else "agreement")
    if isinstance(value, Unjudgeable):
      return Judged(sample, value)
    confidence = math.exp(min(value, 0.0)) if self.by == "probability" else value
    sample = sample | {"label": label, "confidence": confidence}
    if confidence < self.confidence:
      return Judged(sample, f"low confidence: {confidence:.3f}, minimum {self.confidence}")
    return Judged(sample, None)
