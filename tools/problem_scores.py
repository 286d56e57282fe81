"""Scores of a model's answers to problems, and means over seeds, for drivers of experiments."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from distill_jax.evals import _scores


def read(folder: Path) -> dict[str, object]:
  """Returns the teacher's results of the benchmark "problems", and those of each problem.

  `right` is the fraction of a problem's answers that are correct, and `majority` the score of their
  vote.

  Args:
    folder: The folder of `evaluate`.
  """
  row = json.loads((folder / "evaluation.json").read_text())["evals"]["problems"]["teacher"]
  lines = (folder / "evals" / "teacher" / "problems" / "verdicts.jsonl").read_text().splitlines()
  answers: dict[int, list[dict]] = {}
  for line in map(json.loads, lines):
    answers.setdefault(line["id"], []).append(line)
  right = {i: [line["right"] for line in answers[i]] for i in sorted(answers)}
  votes = {i: _scores.majority([line["answer"] for line in answers[i]], right[i]) for i in right}
  return row | {
    "right": {str(i): sum(r) / len(r) for i, r in right.items()},
    "majority": {str(i): vote for i, vote in votes.items()},
  }


def interval(seeds: Sequence[dict[str, float]]) -> _scores.Number:
  """Returns the mean over seeds with its interval over problems, those that all seeds have."""
  shared = sorted(set.intersection(*(set(values) for values in seeds)))
  return _scores.interval([sum(v[i] for v in seeds) / len(seeds) for i in shared])


def percent(number: _scores.Number) -> str:
  """Returns a number with its interval in percent."""
  value, low, high = (100 * number[key] for key in ("value", "low", "high"))
  return f"{value:.1f}% ({low:.1f} to {high:.1f})"


def difference(ours: list[dict[str, float]], others: list[dict[str, float]]) -> str:
  """Returns the mean over seeds of the difference, with its interval over problems.

  A single other result is compared with all of ours.
  """
  pairs = list(zip(ours, others * len(ours) if len(others) == 1 else others, strict=False))
  seeds = [{i: a[i] - b[i] for i in a.keys() & b.keys()} for a, b in pairs]
  return percent(interval(seeds))
