"""Keeps texts with one block of reasoning and then an answer, in one language.

These are DeepSeek-R1's format rules (arXiv:2501.12948, section 2.3).
"""

from __future__ import annotations

import dataclasses
import functools
import unicodedata

from distill_jax.errors import bad_value
from distill_jax.filters._base import SampleFilter
from distill_jax.filters.samples import Sample

OPENED = ("text", "prompt", "either")


@dataclasses.dataclass(frozen=True)
class Filter(SampleFilter):
  """Rejects texts without exactly one block of reasoning and an answer, or in several scripts."""

  open: str = "<think>"
  """Mark that opens the reasoning."""
  close: str = "</think>"
  """Mark that closes the reasoning. "": texts are not checked for reasoning."""
  opened: str = "either"
  """Place of the opening mark: "text", "prompt" (then the text must not repeat it), or "either"."""
  scripts: tuple[str, ...] = ("LATIN", "GREEK", "MATHEMATICAL")
  """Scripts of the letters, as the first words of their Unicode names, e.g. "LATIN", "CJK" or
  "CYRILLIC". (): any."""
  other_share: float = 0.02
  """Maximum fraction of letters in other scripts, in [0, 1]."""

  def __post_init__(self):
    if self.opened not in OPENED:
      raise bad_value("opened", self.opened, f"one of {OPENED}", "Choose one of them")
    if not 0 <= self.other_share <= 1:
      raise bad_value("other_share", self.other_share, "a fraction in [0, 1]", "Correct it")
    if self.close and not self.open:
      raise bad_value(
        "open", self.open, "the opening mark that belongs to close", "Set it, or empty close"
      )

  def reject_reason(self, sample: Sample) -> str | None:
    text = sample["text"]
    return (self.close and self._block(text.strip())) or self._language(text) or None

  def _block(self, text: str) -> str:
    opens, closes = text.count(self.open), text.count(self.close)
    if opens > 1 or closes > 1:
      return f"several reasoning blocks: {opens} opened, {closes} closed"
    if not closes:
      return "reasoning is not closed" if opens else "no reasoning"
    if opens and not text.startswith(self.open):
      return "text before the reasoning"
    if opens and self.opened == "prompt":
      return "reasoning is opened twice"
    if not opens and self.opened == "text":
      return "reasoning is not opened"
    reasoning, _, answer = text.removeprefix(self.open).partition(self.close)
    if not reasoning.strip():
      return "empty reasoning"
    return "" if answer.strip() else "no answer after the reasoning"

  def _language(self, text: str) -> str:
    if not self.scripts:
      return ""
    other = {c for c in set(text) if c.isalpha() and _script(c) not in self.scripts}
    if not other:
      return ""
    letters, others = sum(map(str.isalpha, text)), sum(map(text.count, other))
    if others <= self.other_share * letters:
      return ""
    first = next(c for c in text if c in other)
    return f"mixed language: {others} of {letters} letters, e.g. {first!r}"


@functools.lru_cache(4096)
def _script(letter: str) -> str:
  return unicodedata.name(letter, "").partition(" ")[0].partition("-")[0]
