"""Removes samples that share a run of words with an evaluation set.

The rule is GPT-3's (arXiv:2005.14165, appendix C): words are compared without case and punctuation,
in runs of 13. An evaluation example of 8 to 12 words must occur in full. Shorter examples are not
searched for, since common phrases would match them; their number is printed on standard error.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from distill_jax.data import jsonl
from distill_jax.errors import InputError, bad_value
from distill_jax.filters._base import SampleFilter
from distill_jax.filters._ngrams import WORD, run_hashes, word_hashes
from distill_jax.filters.samples import Sample, prompt_text
from distill_jax.runtime import files, json_io

MIN_WORDS = 8


@dataclasses.dataclass(frozen=True)
class Filter(SampleFilter):
  """Rejects samples that share a run of words with an evaluation set."""

  against: tuple[str, ...] = ()
  """Evaluation sets: .jsonl files with one example per line, by path or URL."""
  fields: tuple[str, ...] = ()
  """Fields of the examples to compare with. (): all their text."""
  ngram: int = 13
  """Length of a run, in words; at least 8. Each character of Chinese and Japanese is a word."""
  prompt: bool = True
  """True to search the samples' prompts and texts; False to search only the texts."""

  def __post_init__(self):
    if self.ngram < MIN_WORDS:
      raise bad_value(
        "ngram", self.ngram, f"at least {MIN_WORDS}", "Increase it, since shorter runs are common"
      )

  def prepare(self) -> str:
    _read.cache_clear()  # the files may have changed since an earlier run of this process
    runs = _read(self)
    for line in runs.notes:
      print(f"decontaminate: {line}", file=sys.stderr)
    return runs.digest()

  def reject_reason(self, sample: Sample) -> str | None:
    text = f"{prompt_text(sample)}\n" * self.prompt + sample["text"]
    return _read(self).overlap(words(text))

  def runs(self) -> Runs:
    """Returns the runs of words of the evaluation sets."""
    if not self.against:
      raise bad_value(
        "against", self.against, "at least one file", "Name .jsonl files of evaluation sets"
      )
    runs = Runs()
    for path in self.against:
      self._add(path, runs)
    return runs

  def _add(self, path: str, runs: Runs) -> None:
    if files.info(path) is None:
      raise bad_value("against", path, "an existing file", "Name a .jsonl file")
    examples = short = 0
    for line in jsonl.read_lines(path, skip_bom=True):
      where = f"{PurePosixPath(path).stem}, line {line.number}"
      for text in self._texts(line):
        text_words = words(text)
        examples, short = examples + 1, short + (len(text_words) < MIN_WORDS)
        runs.add(text_words, self.ngram, where)
    if examples == short:
      fields = f"the fields {', '.join(self.fields)} of {path}" if self.fields else path
      raise InputError(
        f"All texts in {fields} have fewer than {MIN_WORDS} words. Name other files or fields."
      )
    if short:
      count = f"{short:,} of {examples:,} texts have fewer than {MIN_WORDS} words"
      runs.notes.append(f"{path}: {count} and are not searched for.")

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


class Runs:
  """The runs of words of evaluation sets, about 150 bytes each.

  Attributes:
    notes: Sentences about texts that are not searched for.
  """

  def __init__(self) -> None:
    self.notes: list[str] = []
    self._places: dict[int, dict[str, str]] = {}  # number of words: {run of words: its place}

  def add(self, text_words: list[str], n: int, place: str) -> None:
    """Adds the runs of `n` words of a text, or all of a text with MIN_WORDS to `n` words."""
    n = min(n, len(text_words))
    if n >= MIN_WORDS:
      places = self._places.setdefault(n, {})
      for at in range(len(text_words) - n + 1):
        places.setdefault(" ".join(text_words[at : at + n]), place)

  def digest(self) -> str:
    """Returns a digest of the runs and their places."""
    return hashlib.sha256(repr(sorted(self._places.items())).encode(errors="replace")).hexdigest()

  @functools.cached_property
  def _begins(self) -> np.ndarray:
    """A table of 2^k truth values: the hashes, modulo 2^k, of the MIN_WORDS words that begin a run.

    It has at least 64 entries for each run, so a run that is not known is looked for in vain at
    fewer than 2% of the positions.
    """
    begins = [run.split(" ", MIN_WORDS)[:MIN_WORDS] for p in self._places.values() for run in p]
    table = np.zeros(2 ** max(10, (64 * len(begins)).bit_length()), bool)
    hashes = [run_hashes(word_hashes(begin), MIN_WORDS) for begin in begins]
    table[np.concatenate(hashes) & np.uint64(len(table) - 1)] = True
    return table

  def overlap(self, text_words: list[str]) -> str | None:
    """Returns the place and the words of the first run that is in a text, or None."""
    hashes = run_hashes(word_hashes(text_words), MIN_WORDS)
    (found,) = np.nonzero(self._begins[hashes & np.uint64(len(self._begins) - 1)])
    for n, known in sorted(self._places.items(), reverse=True):
      for at in found.tolist():
        run = " ".join(text_words[at : at + n])
        if run in known:
          name, _, line = known[run].rpartition(", ")
          return f"in {name}: {line}, {run!r}"
    return None


@functools.lru_cache(8)
def _read(one_filter: Filter) -> Runs:
  """Returns the runs of a filter, which are read once per process."""
  return one_filter.runs()


def words(text: str) -> list[str]:
  """Returns the words of a text in a form without case and punctuation."""
  if not text.isascii():
    text = unicodedata.normalize("NFKC", text)
  return WORD.findall(text.casefold())


def _strings(value: Any) -> Iterator[str]:
  if isinstance(value, str):
    yield value
  elif isinstance(value, list | dict):
    for part in value.values() if isinstance(value, dict) else value:
      yield from _strings(part)
