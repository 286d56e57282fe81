"""Texts in which a pattern is found, or is not."""

from __future__ import annotations

import dataclasses
import re

from distill_jax.errors import InputError
from distill_jax.filters.samples import Sample


@dataclasses.dataclass(frozen=True)
class Filter:
  """Attributes:
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

  def keep(self, sample: Sample) -> str | None:
    find = lambda pattern: re.search(pattern, sample["text"], re.DOTALL | re.MULTILINE)
    for pattern in self.must:
      if not find(pattern):
        return f"lacks {pattern}"
    for pattern in self.must_not:
      if found := find(pattern):
        return f"has {pattern}: {found[0]!r:.80}"
    return None
