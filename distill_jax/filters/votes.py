"""Samples of a prompt that give the answer most of them give (arXiv:2203.11171).

`agreement`, the share of the prompt's samples that the answer has, goes into the samples: how
much a label is to be trusted, and so what label smoothing leaves of it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator

from distill_jax.errors import InputError
from distill_jax.filters import _base, answers
from distill_jax.filters.exact import plain
from distill_jax.filters.samples import Judged, Sample, answer_part, by_prompt


@dataclasses.dataclass(frozen=True)
class Filter(_base.Filter):
  r"""Rejects answers that most samples of the prompt do not give, and writes `agreement`.

  Attributes:
    of: "final", the last \boxed{…}, what follows "####", or the last number; "text": all that
      comes after the reasoning.
    at_least: the smallest agreement. The share is of all samples of the prompt, those included
      that earlier filters rejected.
    one: of those that agree, only the first is kept.
  """

  of: str = "final"
  at_least: float = 0.0
  one: bool = False

  def __post_init__(self):
    if self.of not in ("final", "text") or not 0 <= self.at_least <= 1:
      raise InputError(
        f"votes are of {self.of!r} with at_least {self.at_least}; they are of 'final' or 'text', "
        "the share from 0 to 1"
      )

  def select(self, samples: Iterable[Sample]) -> Iterator[Judged]:
    for group in by_prompt(samples):
      answers = [self._answer(sample["text"]) for sample in group]
      best = Counter(answer for answer in answers if answer).most_common(2)
      tie = len(best) == 2 and best[0][1] == best[1][1]
      winner, votes = best[0] if best else ("", 0)
      agreement, chosen = votes / group[0]["of"], False
      for sample, answer in zip(group, answers, strict=True):
        why = None
        if not answer:
          why = "no answer to vote with"
        elif tie:
          why = f"tie: {votes} votes each for {winner!r:.40} and {best[1][0]!r:.40}"
        elif agreement < self.at_least:
          why = f"too little agreement: {votes} of {group[0]['of']}"
        elif answer != winner:
          why = f"outvoted: {answer!r:.40} by {winner!r:.40}"
        elif self.one and chosen:
          why = "another was chosen"
        chosen = chosen or why is None
        yield Judged(sample | ({"agreement": agreement} if why is None else {}), why)

  def _answer(self, text: str) -> str:
    text = answer_part(text)
    if self.of == "text":
      return plain(text)
    answer = answers.final(text)
    return answers.canonical(answer) if answer else ""
