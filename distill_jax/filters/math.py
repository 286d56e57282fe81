"""Answers that equal the key as mathematics: fractions, units, degrees, sets, \\boxed{…}.

Equality is `math-verify`'s, over sympy, in worker processes: what sympy never finishes is ended
and rejected as such, and the next answer gets a new worker.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Iterable, Iterator

from distill_jax.errors import InputError
from distill_jax.filters import _base, answers
from distill_jax.filters._math_pool import Pool
from distill_jax.filters.exact import plain
from distill_jax.filters.samples import (
  Judged,
  Sample,
  Unjudgeable,
  answer_part,
  judge_in_parallel,
  text_field,
)

# Read as words: sympy would read a product of letters, in any order.
WORDS = re.compile(r"(?:no|[^\W\d_]{3,})(?:[\s'-]+[^\W\d_]+)*\.?", re.IGNORECASE)
UNIT = re.compile(rf"(\$?-?(?:{answers.DIGITS})(?:/\d+)?)\s+[^\W\d_]+(?:\s+[^\W\d_]+)*\.?")


@dataclasses.dataclass(frozen=True)
class Filter(_base.Filter):
  r"""Rejects answers that do not equal the key as mathematics.

  Attributes:
    key: field of the prompt's line that holds the answer: the answer alone, or a solution with
      \boxed{…} or "####" before it.
    box_only: an answer counts only in \boxed{…}; else what follows "####", or the last number,
      does too.
    seconds: of computing, until an answer is given up.
    workers: answers at once.
  """

  key: str = "answer"
  box_only: bool = False
  seconds: float = 5.0
  workers: int = 2

  def __post_init__(self):
    if self.seconds <= 0 or self.workers < 1:
      raise InputError(
        f"seconds is {self.seconds} and workers {self.workers}; the first is above 0, the second "
        "at least 1"
      )

  def select(self, samples: Iterable[Sample]) -> Iterator[Judged]:
    if importlib.util.find_spec("math_verify") is None:
      raise InputError("math-verify is not installed; pip install 'distill-jax[data]'")
    with Pool(self.seconds) as pool:

      def reject_reason(sample: Sample) -> str | None:
        return self._reject_reason(sample, pool)

      yield from judge_in_parallel(reject_reason, samples, self.workers)

  def _reject_reason(self, sample: Sample, pool: Pool) -> str | None:
    whole_key = text_field(sample, self.key)
    if isinstance(whole_key, Unjudgeable):
      return whole_key
    key = answers.unwrapped(answers.key(whole_key))
    answer = answers.final(answer_part(sample["text"]), self.box_only)
    answer = answer and answers.unwrapped(answer)
    if WORDS.fullmatch(key):
      if answer is None:
        return "no final answer"
      same = plain(answer) == plain(key)
      return None if same else f"wrong: {answer!r:.80}, and the key is {key!r}"
    # The key is read first, so that a bad one is found whatever the sample is.
    verdict = pool.equal(_without_unit(key), _without_unit(answer or ""))
    if verdict == "key":
      return Unjudgeable(f"the key cannot be parsed: {whole_key!r:.80}")
    if answer is None:
      return "no final answer"
    if verdict == "equal":
      return None
    kind = "wrong" if verdict == "other" else verdict
    return f"{kind}: {answer!r:.80}, and the key is {key!r:.80}"


def _without_unit(answer: str) -> str:
  """Returns an answer without a unit in words, which would be read as a product of letters."""
  answer = answers.GROUPS.sub("", answer.strip()).rstrip(".")
  match = UNIT.fullmatch(answer)
  return match[1] if match else answer
