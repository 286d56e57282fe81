"""Answers that are the key, letter by letter but for case, spaces and a last full stop."""

from __future__ import annotations

import dataclasses
import unicodedata

from distill_jax.errors import InputError
from distill_jax.filters import answers
from distill_jax.filters.samples import Bad, Sample, answer_part, string

OF = ("text", "last line", "final")


@dataclasses.dataclass(frozen=True)
class Filter:
  r"""Attributes:
  key: field of the prompt's line that holds the answer.
  of: what is compared, once the reasoning is cut off: "text", "last line", or "final", the
    last \boxed{…}, what follows "####", or the last number.
  """

  key: str = "answer"
  of: str = "text"

  def __post_init__(self):
    if self.of not in OF:
      raise InputError(f"an exact filter's of is {self.of!r}; it can be one of {OF}")

  def keep(self, sample: Sample) -> str | None:
    key = string(sample, self.key)
    if isinstance(key, Bad):
      return key
    text = answer_part(sample["text"]).strip()
    said: str | None = text
    if self.of == "last line":
      said = text.rpartition("\n")[2]
    elif self.of == "final":
      key, said = answers.key(key), answers.final(text)
    if not plain(key):
      return Bad(f"empty key: field {self.key!r} holds no word")
    if said is None:
      return "no final answer"
    return None if plain(said) == plain(key) else f"wrong: {said!r:.80}, and the key is {key!r:.80}"


def plain(text: str) -> str:
  return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".").rstrip()
