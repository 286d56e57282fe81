"""Keeps the samples with the most frequent answer to a prompt (self-consistency, arXiv:2203.11171).

The filter writes the field `agreement`: the fraction of the prompt's samples that have this answer.
It can serve as the confidence in a label (data.trust), which determines label smoothing.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence

from distill_jax.errors import bad_value
from distill_jax.filters import _base, answers
from distill_jax.filters.exact import plain
from distill_jax.filters.samples import Judged, Sample, answer_part

OF = ("final", "text")


@dataclasses.dataclass(frozen=True)
class Filter(_base.Filter):
  """Rejects samples that differ from the prompt's most frequent answer, and writes `agreement`."""

  of: str = "final"
  r"""Part of the text after the reasoning that is the answer: "final" (the content of the last
  \boxed{…}, else the text after "####", else the last number), or "text" (all of it)."""
  at_least: float = 0.0
  """Minimum agreement, in [0, 1]: the fraction of all samples of the prompt, including those that
  earlier filters rejected."""
  one: bool = False
  """True to keep only the first sample with the most frequent answer."""

  def __post_init__(self):
    if self.of not in OF:
      raise bad_value("of", self.of, f"one of {OF}", "Choose one of them")
    if not 0 <= self.at_least <= 1:
      raise bad_value("at_least", self.at_least, "a fraction in [0, 1]", "Correct it")

  def select(self, samples: Sequence[Sample]) -> Iterator[Judged]:
    answers = [self._answer(sample["text"]) for sample in samples]
    best = Counter(answer for answer in answers if answer).most_common(2)
    tie = len(best) == 2 and best[0][1] == best[1][1]
    winner, votes = best[0] if best else ("", 0)
    agreement, chosen = votes / samples[0]["of"], False
    for sample, answer in zip(samples, answers, strict=True):
      why = None
      if not answer:
        why = "no answer"
      elif tie:
        why = f"tie: {votes} votes each for {winner!r:.40} and {best[1][0]!r:.40}"
      elif agreement < self.at_least:
        why = f"low agreement: {votes} of {samples[0]['of']}"
      elif answer != winner:
        why = f"outvoted: {answer!r:.40} by {winner!r:.40}"
      elif self.one and chosen:
        why = "another sample with this answer is kept"
      chosen = chosen or why is None
      yield Judged(sample | ({"agreement": agreement} if why is None else {}), why)

  def _answer(self, text: str) -> str:
    text = answer_part(text)
    if self.of == "text":
      return plain(text)
    answer = answers.final(text)
    return answers.canonical(answer) if answer else ""
