"""Labels that a teacher gives to unlabelled text, where it is sure (pseudo-labels).

The prompts ask for a label and the samples are what the teacher said. `label` and `confidence`
go into the samples.
"""

from __future__ import annotations

import dataclasses
import math

from distill_jax.errors import InputError
from distill_jax.filters.exact import plain
from distill_jax.filters.samples import Bad, Judged, Sample, answer_part, number

BY = ("probability", "agreement")


@dataclasses.dataclass(frozen=True)
class Filter:
  """Attributes:
  labels: what can be said, compared without regard to case.
  confidence: the smallest.
  by: "probability", the teacher's of all it said, or "agreement", which votes (votes.py, of
    "text") have left.
  """

  labels: tuple[str, ...] = ()
  confidence: float = 0.9
  by: str = "probability"

  def __post_init__(self):
    if len({plain(label) for label in self.labels}) != len(self.labels):
      raise InputError(f"labels are {self.labels}, two of which are the same; name each once")
    if self.by not in BY or not 0 <= self.confidence <= 1:
      raise InputError(
        f"by is {self.by!r} and confidence {self.confidence}; by can be one of {BY}, confidence is "
        "from 0 to 1"
      )

  def select(self, samples):
    if not self.labels:
      raise InputError("a pseudo_label filter has no labels; name what the teacher can say")
    return (self._judged(sample) for sample in samples)

  def _judged(self, sample: Sample) -> Judged:
    said = plain(answer_part(sample["text"]))
    label = next((label for label in self.labels if plain(label) == said), None)
    if label is None:
      return sample, f"no label: {said!r:.80}"
    field = "logprob" if self.by == "probability" else "agreement"
    value = number(sample, field)
    if isinstance(value, Bad):
      return sample, value
    sure = math.exp(min(value, 0.0)) if self.by == "probability" else value
    sample = sample | {"label": label, "confidence": sure}
    low = sure < self.confidence
    return sample, f"unsure: {sure:.3f}, at least {self.confidence}" if low else None
