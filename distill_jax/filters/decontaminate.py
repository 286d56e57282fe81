"""Samples that share a run of words with an evaluation set.

As in GPT-3 (arXiv:2005.14165, appendix C): words are compared without case and punctuation, in
runs of 13; an example of 8 to 12 words counts where it stands in full; shorter ones would be
found everywhere, and are not looked for. How many those are is said on standard error.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from distill_jax.errors import InputError
from distill_jax.filters.samples import Judged, Sample, prompt_text

SHORTEST = 8
WORD = re.compile(r"\w+")
Runs = dict[int, dict[str, str]]  # length in words: run: where it comes from


@dataclasses.dataclass(frozen=True)
class Filter:
  """Attributes:
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
    if self.ngram < SHORTEST:
      raise InputError(f"ngram is {self.ngram}; runs of fewer than {SHORTEST} words are everywhere")

  def select(self, samples: Iterable[Sample]) -> Iterator[Judged]:
    if not self.against:
      raise InputError("a decontaminate filter has nothing in against; name evaluation sets")
    runs: Runs = {}
    for path in self.against:
      self._add(Path(path), runs)
    for sample in samples:
      text = f"{prompt_text(sample)}\n" * self.prompt + sample["text"]
      yield sample, overlap(words(text), runs)

  def _add(self, path: Path, runs: Runs) -> None:
    if not path.is_file():
      raise InputError(f"{path} is not there; name a .jsonl file of an evaluation set")
    examples = short = 0
    with path.open("rb") as lines:
      for number, raw in enumerate(lines, 1):
        if not raw.strip():
          continue
        where = f"{path.stem}, line {number}"
        for text in self._texts(raw, f"{path}, line {number}"):
          found = words(text)
          examples, short = examples + 1, short + (len(found) < SHORTEST)
          n = min(self.ngram, len(found))
          if n >= SHORTEST:
            for at in range(len(found) - n + 1):
              runs.setdefault(n, {}).setdefault(" ".join(found[at : at + n]), where)
    if examples == short:
      raise InputError(f"{path} has no text of {SHORTEST} words or more in {self.fields or 'it'}")
    if short:
      said = f"{short:,} of {examples:,} texts have fewer than {SHORTEST} words"
      print(f"decontaminate: {path}: {said} and are not looked for", file=sys.stderr)

  def _texts(self, raw: bytes, where: str) -> Iterator[str]:
    try:
      row = json.loads(raw)
    except (ValueError, RecursionError) as e:
      raise InputError(f"{where}: not JSON ({e}); mend the line") from e
    if not self.fields:
      yield from _strings(row)
      return
    for field in self.fields:
      if not isinstance(row, dict) or field not in row:
        there = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
        raise InputError(f"{where}: no field {field!r}, but {there}; name other fields")
      yield from _strings(row[field])


def words(text: str) -> list[str]:
  return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def overlap(found: list[str], runs: Runs) -> str | None:
  """The first run that stands in an evaluation set."""
  for n, known in sorted(runs.items(), reverse=True):
    for at in range(len(found) - n + 1):
      run = " ".join(found[at : at + n])
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
