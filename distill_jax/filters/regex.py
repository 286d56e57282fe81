"""Texts in which a pattern is found, or is not."""

from __future__ import annotations

import dataclasses
import re

from distill_jax.errors import InputError
from distill_jax.filters._base import SampleFilter
from distill_jax.filters.samples import Sample


@dataclasses.dataclass(frozen=True)
class Filter(SampleFilter):
  """Rejects texts by patterns.

  Attributes:
    must: each of these regular expressions (Python's `re`) is found in the text …
    must_not: … and none of these. "." is any character, "^" and "$" are of a line.
  """

  must: tuple[str, ...] = ()
  must_not: tuple[str, ...] = ()

  def __post_init__(self):
    for pattern in (*self.must, *self.must_not):
      try:
        re.compile(pattern)
      except re.error as e:
        raise InputError(f"{pattern!r} is no regular expression ({e}); mend it") from e

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
