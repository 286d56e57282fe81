"""The statistics of a converted store: files of its shards, and retarget.json, which sums them."""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from distill_jax.cross_tokenizer.statistics import Statistics
from distill_jax.cross_tokenizer.tables import PairTables
from distill_jax.errors import InputError
from distill_jax.runtime import files, json_io

if TYPE_CHECKING:  # worker processes must not import jax
  from distill_jax.types import JsonObject

NAME = "retarget.json"


def write_shard(folder: str, number: int, statistics: Statistics) -> None:
  """Writes the statistics of a shard."""
  text = json.dumps(_plain(statistics)) + "\n"
  files.write(files.join(folder, _name(number)), text.encode())


class ShardStatistics:
  """Writes the statistics of shards whose rows are recorded in order, one shard after another.

  The statistics of a shard are written before its last rows are given to the writer of the shard.

  Args:
    folder: The folder or URL of the store.
    ranges: The sequences of each shard of the store.
  """

  def __init__(self, folder: str, ranges: Sequence[range]):
    self._folder, self._numbers = folder, {r.start: (n, len(r)) for n, r in enumerate(ranges)}
    self._number, self._rows, self._sum = 0, 0, Statistics()

  def add(self, first: int, statistics: Statistics) -> None:
    """Adds the statistics of the rows from index `first` on, which are of one shard."""
    if first in self._numbers:
      (self._number, self._rows), self._sum = self._numbers[first], Statistics()
    self._sum += statistics
    if self._sum.rows == self._rows:
      write_shard(self._folder, self._number, self._sum)


def merge(folder: str, shards: int, tables: PairTables) -> Statistics:
  """Writes retarget.json for a store whose shards are all finished, and returns the sums.

  It costs a listing of the folder and a small read per shard.

  Raises:
    InputError: The statistics of a shard are missing or damaged.
  """
  found = files.listing(folder, "retarget-*")
  names = [_name(number) for number in range(shards)]
  if missing := [name for name in names if name not in found]:
    raise InputError(
      f"{files.join(folder, missing[0])} is missing. Delete the shard with the same number and its "
      "registration, and run the command again."
    )
  paths = [(files.join(folder, name), 0, found[name].size) for name in names]
  texts = files.read_ranges(paths)
  parts = [_parse(path[0], text) for path, text in zip(paths, texts, strict=True)]
  total = functools.reduce(operator.add, parts, Statistics())
  student, teacher = tables.overlap()
  content = {
    "vocabulary_overlap": {"student": student, "teacher": teacher},
    "statistics": _plain(total),
  }
  files.write(files.join(folder, NAME), (json.dumps(content, indent=1) + "\n").encode())
  return total


def describe(folder: str | os.PathLike[str]) -> JsonObject:
  """Returns the numbers of a store's retarget.json, see `table`; {} without one."""
  path = files.join(folder, NAME)
  if files.info(path) is None:
    return {}
  action = "Delete it and run the command that made the store again"
  found = json_io.parse_object(files.read(path), path, action)
  try:
    overlap = found["vocabulary_overlap"]
    statistics = Statistics(**_counters(found["statistics"]))
    numbers = table(statistics, (overlap["student"], overlap["teacher"]))
  except (KeyError, TypeError, AttributeError) as e:
    raise InputError(f"{path} is not complete ({e}). {action}.") from e
  return {f"retarget.{name}": value for name, value in numbers.items()}


def table(s: Statistics, overlap: tuple[float, float]) -> JsonObject:
  """Returns what conversion did to the targets of a store, as numbers by name.

  Args:
    s: The statistics of its rows.
    overlap: The shares of the student's and of the teacher's tokens whose bytes both have.

  Returns:
    share.exact, share.within and share.spanning: the shares of targets whose token begins with a
    teacher's token and ends with it, before or after its end. share.inside: that of tokens that
    begin inside a teacher's token. fell_back: the share that has its label as its target, see
    RetargetOptions.min_mass. lost_mass: the mean mass that reached no student token.
    misplaced_mass: an estimate of the mean mass that a shorter token got instead of a longer one.
    skipped.REASON: the number of segments without tokens. cut_chains: see Statistics; only if there
    are any. padding: the share of positions.
  """
  kinds, targets = s.kinds, max(s.targets, 1)
  shares = {name: kinds[name] for name in ("exact", "within", "spanning")}
  shares["inside"] = kinds["mid"] + kinds["crossing"]
  return {
    "rows": s.rows,
    "teacher_tokens": s.teacher_tokens,
    "teacher_targets": s.teacher_targets,
    "tokens": s.tokens,
    "targets": s.targets,
    **{f"share.{name}": _digits(count / targets) for name, count in shares.items()},
    "fell_back": _digits(s.hard_targets / targets),
    "lost_mass": _digits(s.lost_mass / targets),
    "misplaced_mass": _digits(s.misplaced_mass),
    "overlap.student": _digits(overlap[0]),
    "overlap.teacher": _digits(overlap[1]),
    **{f"skipped.{reason}": s.skipped[reason] for reason in sorted(s.skipped)},
    "cut_tokens": s.cut_tokens,
    "cut_targets": s.cut_targets,
    **({"cut_chains": s.cut_chains} if s.cut_chains else {}),
    "padding": _digits(1 - s.tokens / max(s.positions, 1)),
  }


def _name(number: int) -> str:
  """Returns the name of the file with the statistics of a shard."""
  return f"retarget-{number:05d}.json"


def _parse(path: str, text: bytes) -> Statistics:
  action = "Delete it, the shard with the same number and its registration, and run again"
  return Statistics(**_counters(json_io.parse_object(text, path, action)))


def _plain(statistics: Statistics) -> JsonObject:
  """Returns statistics as values of JSON."""
  fields = {f.name: getattr(statistics, f.name) for f in dataclasses.fields(statistics)}
  return {k: dict(v) if isinstance(v, Counter) else v for k, v in fields.items()}


def _counters(fields: JsonObject) -> JsonObject:
  return {k: Counter(v) if isinstance(v, dict) else v for k, v in fields.items()}


def _digits(x: float) -> float:
  """Returns a number with 4 significant digits."""
  return float(f"{x:.4g}")
