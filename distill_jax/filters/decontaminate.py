"""Samples that share a run of words with an evaluation set.

As in GPT-3 (arXiv:2005.14165, appendix C): words are compared without case and punctuation, in
runs of 13; an example of 8 to 12 words counts where it stands in full; shorter ones would be
found everywhere, and are not looked for. Their number is printed on standard error.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from distill_jax.data import jsonl
from distill_jax.errors import InputError
from distill_jax.filters import _base
from distill_jax.filters.samples import Judged, Sample, prompt_text
from distill_jax.runtime import json_io

MIN_WORDS = 8
WORD = re.compile(r"\w+")
Runs = dict[int, dict[str, str]]  # length in words: run: where it comes from


@dataclasses.dataclass(frozen=True)
class Filter(_base.Filter):
  """Rejects samples that share a run of words with an evaluation set.

  Attributes:
    against: JSONL files, an example a line.
    fields: of their objects; (): all text in them.
    ngram: words of a run, at least 8.
    prompt: prompts are searched too, not the texts alone.
  """

  against: tuple[str, ...] = ()
  fields: tuple[str, ...] = ()
  ngram: int = 13
  prompt: bool = True

  def __post_init__(self):
    if self.ngram < MIN_WORDS:
      raise InputError(
        f"ngram is {self.ngram}; runs of fewer than {MIN_WORDS} words are everywhere"
      )

  def select(self, samples: Iterable[Sample]) -> Iterator[Judged]:
    if not self.against:
      raise InputError("a decontaminate filter has nothing in against; name evaluation sets")
    runs: Runs = {}
    for path in self.against:
      self._add(Path(path), runs)
    for sample in samples:
      text = f"{prompt_text(sample)}\n" * self.prompt + sample["text"]
      yield Judged(sample, overlap(words(text), runs))

  def _add(self, path: Path, runs: Runs) -> None:
    if not path.is_file():
      raise InputError(f"{path} is not there; name a .jsonl file of an evaluation set")
    examples = short = 0
    for line in jsonl.read_lines(path, skip_bom=True):
      where = f"{path.stem}, line {line.number}"
      for text in self._texts(line):
        text_words = words(text)
        examples, short = examples + 1, short + (len(text_words) < MIN_WORDS)
        n = min(self.ngram, len(text_words))
        if n >= MIN_WORDS:
          for at in range(len(text_words) - n + 1):
            runs.setdefault(n, {}).setdefault(" ".join(text_words[at : at + n]), where)
    if examples == short:
      raise InputError(f"{path} has no text of {MIN_WORDS} words or more in {self.fields or 'it'}")
    if short:
      count = f"{short:,} of {examples:,} texts have fewer than {MIN_WORDS} words"
      print(f"decontaminate: {path}: {count} and are not looked for", file=sys.stderr)

  def _texts(self, line: jsonl.Line) -> Iterator[str]:
    try:
      row = json_io.parse(line.raw, action="mend the line")
    except InputError as e:
      raise InputError(f"{line.where}: {e}") from e
    if not self.fields:
      yield from _strings(row)
      return
    for field in self.fields:
      if not isinstance(row, dict) or field not in row:
        names = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
        raise InputError(f"{line.where}: no field {field!r}, but {names}; name other fields")
      yield from _strings(row[field])


def words(text: str) -> list[str]:
  """Returns the words of a text without regard to case."""
  return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def overlap(text_words: list[str], runs: Runs) -> str | None:
  """Returns where the first run comes from that stands in an evaluation set, or None."""
  for n, known in sorted(runs.items(), reverse=True):
    for at in range(len(text_words) - n + 1):
      run = " ".join(text_words[at : at + n])
      if run in known:
        name, _, line = known[run].rpartition(", ")
        return f"in {name}: {line}, {run!r}"
  return None


def _strings(value: Any) -> Iterator[str]:
  if isinstance(value, str):
    yield value
  elif isinstance(value, list | dict):
    for part in value.values() if isinstance(value, dict) else value:
      yield from _strings(part)
