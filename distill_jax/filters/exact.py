"""Answers that are the key, letter by letter but for case, spaces and a last full stop."""

from __future__ import annotations

import dataclasses
import unicodedata

from distill_jax.errors import InputError
from distill_jax.filters import answers
from distill_jax.filters._base import SampleFilter
from distill_jax.filters.samples import Sample, Unjudgeable, answer_part, text_field

OF = ("text", "last line", "final")


@dataclasses.dataclass(frozen=True)
class Filter(SampleFilter):
  r"""Rejects answers that differ from the key.

  Attributes:
    key: field of the prompt's line that holds the answer.
    of: what is compared, once the reasoning is cut off: "text", "last line", or "final", the
      last \boxed{…}, what follows "####", or the last number.
  """

  key: str = "answer"
  of: str = "text"

  def __post_init__(self):
    if self.of not in OF:
      raise InputError(f"an exact filter's of is {self.of!r}; it can be one of {OF}")

  def reject_reason(self, sample: Sample) -> str | None:
    key = text_field(sample, self.key)
    if isinstance(key, Unjudgeable):
      return key
    text = answer_part(sample["text"]).strip()
    answer: str | None = text
    if self.of == "last line":
      answer = text.rpartition("\n")[2]
    elif self.of == "final":
      key, answer = answers.key(key), answers.final(text)
    if not plain(key):
      return Unjudgeable(f"empty key: field {self.key!r} holds no word")
    if answer is None:
      return "no final answer"
    if plain(answer) == plain(key):
      return None
    return f"wrong: {answer!r:.80}, and the key is {key!r:.80}"


def plain(text: str) -> str:
  """Returns a text without regard to case, spaces and a last full stop."""
  return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".").rstrip()
