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
from distill_jax.filters import answers
from distill_jax.filters._math_pool import Pool
from distill_jax.filters.exact import plain
from distill_jax.filters.samples import Bad, Judged, Sample, answer_part, ordered, string

# Read as words: sympy would read a product of letters, in any order.
WORDS = re.compile(r"(?:no|[^\W\d_]{3,})(?:[\s'-]+[^\W\d_]+)*\.?", re.IGNORECASE)
UNIT = re.compile(rf"(\$?-?(?:{answers.DIGITS})(?:/\d+)?)\s+[^\W\d_]+(?:\s+[^\W\d_]+)*\.?")


@dataclasses.dataclass(frozen=True)
class Filter:
  r"""Attributes:
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
      yield from ordered(lambda sample: self._judge(sample, pool), samples, self.workers)

  def _judge(self, sample: Sample, pool: Pool) -> str | None:
    given = string(sample, self.key)
    if isinstance(given, Bad):
      return given
    key = answers.unwrapped(answers.key(given))
    said = answers.final(answer_part(sample["text"]), self.box_only)
    said = said and answers.unwrapped(said)
    if WORDS.fullmatch(key):
      if said is None:
        return "no final answer"
      return None if plain(said) == plain(key) else f"wrong: {said!r:.80}, and the key is {key!r}"
    # The key is read first, so that a bad one is told whatever the sample says.
    verdict = pool.equal(_bare(key), _bare(said or ""))
    if verdict == "key":
      return Bad(f"the key cannot be parsed: {given!r:.80}")
    if said is None:
      return "no final answer"
    if verdict in ("equal", "other"):
      return None if verdict == "equal" else f"wrong: {said!r:.80}, and the key is {key!r:.80}"
    return f"{verdict}: {said!r:.80}, and the key is {key!r:.80}"


def _bare(answer: str) -> str:
  """Without a unit in plain words, which would be read as a product of letters."""
  answer = answers.GROUPS.sub("", answer.strip()).rstrip(".")
  match = UNIT.fullmatch(answer)
  return match[1] if match else answer
