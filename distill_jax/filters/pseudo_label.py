"""Labels that a teacher gives to unlabelled text, where it is sure (pseudo-labels).

The prompts ask for a label and the samples are the teacher's outputs. `label` and `confidence` go
into the samples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator

from distill_jax.errors import InputError
from distill_jax.filters import _base
from distill_jax.filters.exact import plain
from distill_jax.filters.samples import Judged, Sample, Unjudgeable, answer_part, number_field

BY = ("probability", "agreement")


@dataclasses.dataclass(frozen=True)
class Filter(_base.Filter):
  """Rejects labels that the teacher is not sure of, and writes `label` and `confidence`.

  Attributes:
    labels: the possible outputs, compared without regard to case.
    confidence: the smallest.
    by: "probability", the teacher's of the whole output, or "agreement", which votes (votes.py, of
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

  def select(self, samples: Iterable[Sample]) -> Iterator[Judged]:
    if not self.labels:
      raise InputError("a pseudo_label filter has no labels; name what the teacher can output")
    return (self._judged(sample) for sample in samples)

  def _judged(self, sample: Sample) -> Judged:
    output = plain(answer_part(sample["text"]))
    label = next((label for label in self.labels if plain(label) == output), None)
    if label is None:
      return Judged(sample, f"no label: {output!r:.80}")
    value = number_field(sample, "logprob" if self.by == "probability" else "agreement")
    if isinstance(value, Unjudgeable):
      return Judged(sample, value)
    confidence = math.exp(min(value, 0.0)) if self.by == "probability" else value
    sample = sample | {"label": label, "confidence": confidence}
    if confidence < self.confidence:
      return Judged(sample, f"unsure: {confidence:.3f}, at least {self.confidence}")
    return Judged(sample, None)
