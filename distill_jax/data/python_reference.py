"""Python's language reference, which every CPython contains, as documents."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

RUN = 8  # number of consecutive words that two texts must share to be considered the same text


def topics(is_chosen: Callable[[str], bool], whole: bool) -> Iterator[str]:
  """Yields the topics of a split, sorted by name.

  The reference repeats itself: "compound" contains all of "for" and "while". Nine tenths of the
  held-out lines also occur in training topics, so every training paragraph that shares a run of
  RUN words with a held-out topic is removed.

  Args:
    is_chosen: Returns True for the names of the split's topics.
    whole: True to yield the topics unchanged; False to remove the text of the other topics.
  """
  texts = importlib.import_module("pydoc_data.topics").topics
  names = [name for name in sorted(texts) if is_chosen(name)]
  if whole:
    yield from (texts[name] for name in names)
    return
  chosen = set(names)
  others = {run for name in texts if name not in chosen for run in _runs(texts[name])}
  for name in names:
    paragraphs = texts[name].split("\n\n")
    yield "\n\n".join(p for p in paragraphs if others.isdisjoint(_runs(p)))


def _runs(text: str) -> Iterator[tuple[str, ...]]:
  words = text.split()
  return zip(*(words[i:] for i in range(RUN)), strict=False)
