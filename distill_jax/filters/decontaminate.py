"""Removes samples that share a run of words with an evaluation set.

The rule is GPT-3's (arXiv:2005.14165, appendix C): words are compared without case and punctuation,
in runs of 13. An evaluation example of 8 to 12 words must occur in full. Shorter examples are not
searched for, since common phrases would match them; their number is printed on standard error.
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
from distill_jax.errors import InputError, bad_value
from distill_jax.filters import _base
from distill_jax.filters.samples import Judged, Sample, prompt_text
from distill_jax.runtime import json_io

MIN_WORDS = 8
WORD = re.compile(r"\w+")
Runs = dict[int, dict[str, str]]  # number of words: {run of words: its place}


@dataclasses.dataclass(frozen=True)
class Filter(_base.Filter):
  """Rejects samples that share a run of words with an evaluation set."""

  against: tuple[str, ...] = ()
  """Evaluation sets: .jsonl files with one example per line."""
  fields: tuple[str, ...] = ()
  """Fields of the examples to compare with. (): all their text."""
  ngram: int = 13
  """Length of a run, in words; at least 8."""
  prompt: bool = True
  """True to search the samples' prompts and texts; False to search only the texts."""

  def __post_init__(self):
    if self.ngram < MIN_WORDS:
      raise bad_value(
        "ngram", self.ngram, f"at least {MIN_WORDS}", "Increase it, since shorter runs are common"
      )

  def select(self, samples: Iterable[Sample]) -> Iterator[Judged]:
    if not self.against:
      raise bad_value(
        "against", self.against, "at least one file", "Name .jsonl files of evaluation sets"
      )
    runs: Runs = {}
    for path in self.against:
      self._add(Path(path), runs)
    for sample in samples:
      text = f"{prompt_text(sample)}\n" * self.prompt + sample["text"]
      yield Judged(sample, overlap(words(text), runs))

  def _add(self, path: Path, runs: Runs) -> None:
    if not path.is_file():
      raise bad_value("against", path, "an existing file", "Name a .jsonl file")
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
      fields = f"the fields {', '.join(self.fields)} of {path}" if self.fields else path
      raise InputError(
        f"All texts in {fields} have fewer than {MIN_WORDS} words. Name other files or fields."
      )
    if short:
      count = f"{short:,} of {examples:,} texts have fewer than {MIN_WORDS} words"
      print(f"decontaminate: {path}: {count} and are not searched for.", file=sys.stderr)

  def _texts(self, line: jsonl.Line) -> Iterator[str]:
    try:
      row = json_io.parse(line.raw, action="Correct the line")
    except InputError as e:
      raise InputError(f"{line.where}: {e}") from e
    if not self.fields:
      yield from _strings(row)
      return
    for field in self.fields:
      if not isinstance(row, dict):
        raise InputError(f"{line.where} is a JSON {type(row).__name__}; expected an object.")
      if field not in row:
        names = ", ".join(map(repr, row)) or "no fields"
        raise InputError(
          f"{line.where} has no field {field!r} (it has {names}). Name other fields."
        )
      yield from _strings(row[field])


def words(text: str) -> list[str]:
  """Returns the words of a text in a form without case and punctuation."""
  return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def overlap(text_words: list[str], runs: Runs) -> str | None:
  """Returns the place and the words of the first run that is in an evaluation set, or None."""
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
