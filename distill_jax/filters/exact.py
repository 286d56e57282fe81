"""Keeps answers that match the answer key, ignoring case, white space and a final full stop."""

from __future__ import annotations

import dataclasses
import unicodedata

from distill_jax.errors import bad_value
from distill_jax.filters import answers
from distill_jax.filters._base import SampleFilter
from distill_jax.filters.samples import Sample, Unjudgeable, answer_part, text_field

OF = ("text", "last line", "final")


@dataclasses.dataclass(frozen=True)
class Filter(SampleFilter):
  """Rejects answers that differ from the answer key."""

  key: str = "answer"
  """Field of the prompt's line that contains the answer key."""
  of: str = "text"
  r"""Part of the text after the reasoning to compare: "text" (all of it), "last line", or "final"
  (the content of the last \boxed{…}, else the text after "####", else the last number)."""

  def __post_init__(self):
    if self.of not in OF:
      raise bad_value("of", self.of, f"one of {OF}", "Choose one of them")

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
      return Unjudgeable(f"empty key: field {self.key!r} has no text")
    if answer is None:
      return "no final answer"
    if plain(answer) == plain(key):
      return None
    return f"wrong: {answer!r:.80}, but the key is {key!r:.80}"


def plain(text: str) -> str:
  """Returns a text in lower case, with single spaces and without a final full stop."""
  return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".").rstrip()
