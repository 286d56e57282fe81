"""One block of reasoning, then an answer, in one language (arXiv:2501.12948, section 2.3)."""

from __future__ import annotations

import dataclasses
import functools
import unicodedata

from distill_jax.errors import InputError
from distill_jax.filters._base import SampleFilter
from distill_jax.filters.samples import Sample


@dataclasses.dataclass(frozen=True)
class Filter(SampleFilter):
  """Rejects texts without one block of reasoning and an answer, or in several scripts.

  Attributes:
    open, close: the marks of a block of reasoning; close "": none is asked for.
    opened: "text", the text itself opens the block; "prompt", the prompt has; "either".
    scripts: the scripts that letters are to be of, by the first word of their Unicode names
      (LATIN, CJK, CYRILLIC); (): any.
    other_share: of letters that may be of other scripts.
  """

  open: str = "<think>"
  close: str = "</think>"
  opened: str = "either"
  scripts: tuple[str, ...] = ("LATIN", "GREEK", "MATHEMATICAL")
  other_share: float = 0.02

  def __post_init__(self):
    if self.opened not in ("text", "prompt", "either") or not 0 <= self.other_share <= 1:
      raise InputError(
        f"opened is {self.opened!r} and other_share {self.other_share}; opened is 'text', 'prompt' "
        "or 'either', the share from 0 to 1"
      )
    if self.close and not self.open:
      raise InputError("a format filter has a close and no open; name both marks or neither")

  def reject_reason(self, sample: Sample) -> str | None:
    text = sample["text"]
    return (self.close and self._block(text.strip())) or self._language(text) or None

  def _block(self, text: str) -> str:
    opens, closes = text.count(self.open), text.count(self.close)
    if opens > 1 or closes > 1:
      return f"several reasoning blocks: {opens} opened, {closes} closed"
    if not closes:
      return "reasoning without end" if opens else "no reasoning"
    if opens and not text.startswith(self.open):
      return "reasoning does not come first"
    if opens and self.opened == "prompt":
      return "reasoning opened twice"
    if not opens and self.opened == "text":
      return "reasoning without beginning"
    reasoning, _, answer = text.removeprefix(self.open).partition(self.close)
    if not reasoning.strip():
      return "empty reasoning"
    return "" if answer.strip() else "no answer after the reasoning"

  def _language(self, text: str) -> str:
    letters = [c for c in text if c.isalpha()] if self.scripts else []
    other = [c for c in letters if _script(c) not in self.scripts]
    if not letters or len(other) <= self.other_share * len(letters):
      return ""
    return f"mixed language: {len(other)} of {len(letters)} letters, as {other[0]!r}"


@functools.lru_cache(4096)
def _script(letter: str) -> str:
  return unicodedata.name(letter, "").partition(" ")[0].partition("-")[0]
