"""Keeps texts by regular expressions."""

from __future__ import annotations

import dataclasses
import re

from distill_jax.errors import bad_value
from distill_jax.filters._base import SampleFilter
from distill_jax.filters.samples import Sample


@dataclasses.dataclass(frozen=True)
class Filter(SampleFilter):
  """Rejects texts that lack a required pattern or have a forbidden one.

  Patterns are Python's regular expressions: "." matches any character, "^" and "$" match at each
  line's start and end.
  """

  must: tuple[str, ...] = ()
  """Regular expressions that must all match somewhere in the text."""
  must_not: tuple[str, ...] = ()
  """Regular expressions that must not match anywhere in the text."""

  def __post_init__(self):
    for key in ("must", "must_not"):
      for pattern in getattr(self, key):
        try:
          re.compile(pattern)
        except re.error as e:
          raise bad_value(
            key, pattern, "a valid regular expression", f"It has an error: {e}"
          ) from e

  def reject_reason(self, sample: Sample) -> str | None:
    for pattern in self.must:
      if not _find(pattern, sample):
        return f"lacks {pattern}"
    for pattern in self.must_not:
      if match := _find(pattern, sample):
        return f"has {pattern}: {match[0]!r:.80}"
    return None


def _find(pattern: str, sample: Sample) -> re.Match[str] | None:
  return re.search(pattern, sample["text"], re.DOTALL | re.MULTILINE)
