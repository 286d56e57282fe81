"""Keeps answers that are mathematically equal to the answer key.

Fractions, units, degrees, sets and \\boxed{…} are understood. Integers are compared directly; for
all other answers `math-verify` compares with sympy, in a worker process. A comparison that takes
too long is ended and its sample rejected.
"""

from __future__ import annotations

import dataclasses
import re

from distill_jax.errors import bad_value
from distill_jax.filters import _math_pool, answers
from distill_jax.filters._base import SampleFilter
from distill_jax.filters.exact import plain
from distill_jax.filters.samples import Sample, Unjudgeable, answer_part, text_field
from distill_jax.runtime import extras

# Answers in words, which are compared as text: sympy would parse a product of letters.
WORDS = re.compile(r"(?:no|[^\W\d_]{3,})(?:[\s'-]+[^\W\d_]+)*\.?", re.IGNORECASE)
INTEGER = re.compile(r"-?[0-9]{1,15}")
UNIT = re.compile(
  rf"(\$?-?(?:{answers.DIGITS})(?:/\d+|\\frac\{{\d+\}}\{{\d+\}})?)\s+[^\W\d_]+(?:\s+[^\W\d_]+)*\.?"
)
TEX_UNIT = re.compile(r"(?<=[\d}])\s*\\(?:text|mathrm)\s*\{[^{}]*\}(?:\^\{?\d\}?)?$")
ASSIGNED = re.compile(r"^\$?[A-Za-z]\s*=")
CURRENCY = re.compile("[€£¥]")


@dataclasses.dataclass(frozen=True)
class Filter(SampleFilter):
  """Rejects answers that are not mathematically equal to the answer key."""

  key: str = "answer"
  r"""Field of the prompt's line with the answer key: the answer alone, or a solution that contains
  the answer in \boxed{…} or after "####"."""
  box_only: bool = False
  r"""True to accept answers only in \boxed{…}; False to accept also the text after "####" or,
  without one, the last number."""
  seconds: float = 5.0
  """CPU time limit for comparing one answer, in seconds."""

  def __post_init__(self):
    if self.seconds <= 0:
      raise bad_value("seconds", self.seconds, "a positive number", "Increase it")

  def prepare(self) -> str:
    if extras.not_installed("math_verify"):
      raise extras.missing("math_verify", "data")
    return ""

  def reject_reason(self, sample: Sample) -> str | None:
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
      return None if same else f"wrong: {answer!r:.80}, but the key is {key!r}"
    # The key is compared even without an answer, so that an invalid key is always reported.
    verdict = _compare(_readable(key), _readable(answer or ""), self.seconds)
    if verdict == "key":
      return Unjudgeable(f"the key cannot be parsed: {whole_key!r:.80}")
    if answer is None:
      return "no final answer"
    if verdict == "equal":
      return None
    kind = "wrong" if verdict == "other" else verdict
    return f"{kind}: {answer!r:.80}, but the key is {key!r:.80}"


def spelling(answer: str) -> str:
  r"""Returns one spelling for answers that this filter considers equal, where sympy is not needed.

  For example, "x=5", "5" and "5\text{ cm}" all become "5".
  """
  answer = ASSIGNED.sub("", TEX_UNIT.sub("", answers.unwrapped(answer.strip())))
  return answers.canonical(_readable(answer))


def _compare(key: str, answer: str, seconds: float) -> str:
  """Returns a verdict of `_math_pool.Pool.equal`; integers need no worker."""
  if INTEGER.fullmatch(key) and INTEGER.fullmatch(answer):
    return "equal" if int(key) == int(answer) else "other"
  return _math_pool.equal(key, answer, seconds)


def _readable(answer: str) -> str:
  """Returns an answer for sympy, which would parse a unit in words as a product of letters."""
  answer = CURRENCY.sub("", answers.GROUPS.sub("", answer.strip())).rstrip(".")
  answer = answers.mixed(answer)
  match = UNIT.fullmatch(answer)
  return match[1] if match else answer
