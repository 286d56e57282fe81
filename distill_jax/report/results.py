"""The results of a run: its numbers, and the sentence that they support.

The sentence is computed, never written beforehand: it says better, equal, worse or not
measured, whichever is so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from distill_jax.errors import InputError
from distill_jax.report.numbers import percent, text
from distill_jax.training.metric_writer import spell
from distill_jax.types import JsonObject

MODELS = {
  "teacher": "Teacher",
  "start": "Student before",
  "hard": "Hard labels",
  "distilled": "Distilled",
}
EQUAL = 0.01  # a difference below this fraction of the hard-label student's number is called none


@dataclasses.dataclass(frozen=True)
class Gap:
  """A difference, and how much of it the distilled student closed.

  Attributes:
    share: the fraction that was closed; None where there is no such gap or a number is missing.
    why: the reason for None.
  """

  name: str
  meaning: str
  share: float | None
  why: str = ""


def number(evaluation: Mapping[str, Any], model: str, key: str) -> float | None:
  """Returns one measured number; None where it was not measured. NaN stays NaN."""
  value = evaluation["models"].get(model, {}).get(key)
  if key == "agreement" and value is not None and (float(value) < 0 or float(value) > 1):
    raise InputError(f"{model}: agreement is {value}; it is a share between 0 and 1")
  return None if value is None else float(value)


def gaps(evaluation: Mapping[str, Any]) -> tuple[Gap, Gap, Gap]:
  """Returns three gaps, and the fraction of each that distillation closed.

  (kl_hard - kl_distilled) / kl_hard; (ce_hard - ce_distilled) / (ce_hard - ce_teacher);
  (kl_start - kl_distilled) / kl_start. The teacher's KL to itself is 0.
  """
  kl = {m: number(evaluation, m, "kl") for m in MODELS} | {"teacher": 0.0}
  ce = {m: number(evaluation, m, "ce") for m in MODELS}
  return (
    _gap(
      "KL to the teacher, from the hard-label student",
      "hard",
      kl,
      "how much of the hard-label student's KL divergence from the teacher is gone in the "
      "distilled one",
    ),
    _gap(
      "Cross-entropy, from the hard-label student",
      "hard",
      ce,
      "how far the distilled student is from the hard-label student's cross-entropy to the "
      "teacher's",
    ),
    _gap(
      "KL to the teacher, from the untrained student",
      "start",
      kl,
      "how much of the student's KL divergence before training is gone after distillation",
    ),
  )


def _gap(name: str, baseline: str, x: dict[str, float | None], meaning: str) -> Gap:
  """The fraction of the way from a baseline to the teacher that the distilled student has gone."""
  start, ours, goal = x[baseline], x["distilled"], x["teacher"]
  if start is None or ours is None or goal is None:
    missing = [MODELS[m] for m in (baseline, "distilled", "teacher") if x[m] is None]
    return Gap(name, meaning, None, f"not measured: {', '.join(missing)}")
  if not all(map(math.isfinite, (start, ours, goal))):
    return Gap(name, meaning, None, "a number is NaN or infinite")
  if start <= goal:
    why = f"{MODELS[baseline]} is already at the teacher: no gap to close"
    return Gap(name, meaning, None, why)
  return Gap(name, meaning, (start - ours) / (start - goal))


def summary(
  evaluation: Mapping[str, Any], records: Mapping[str, Any] | None = None, export_dir: str = ""
) -> JsonObject:
  """Returns the run in a few numbers, as strict JSON (design section 10).

  Returns:
    teacher, start, hard, distilled: each {ce, kl, agreement}; evals, where benchmarks were
    run; gap_closed (of KL), gap_closed_ce; bytes_per_token; export_dir. What was not measured, or
    is not defined, is None; NaN and infinities are strings, as in metrics.jsonl.
  """
  kl, ce, _ = gaps(evaluation)
  numbers: JsonObject = {
    model: {k: _plain(number(evaluation, model, k)) for k in ("ce", "kl", "agreement")}
    for model in MODELS
  }
  if evals := evaluation.get("evals"):
    numbers["evals"] = evals
  return numbers | {
    "gap_closed": kl.share,
    "gap_closed_ce": ce.share,
    "bytes_per_token": _plain((records or {}).get("bytes_per_token")),
    "export_dir": str(export_dir),
  }


def _plain(x: Any) -> float | str | None:
  return None if x is None else spell(float(x))


def headline(evaluation: Mapping[str, Any]) -> str:
  """Returns one sentence: is the distilled student nearer the teacher than its hard-label twin?"""
  kl, ce, _ = gaps(evaluation)
  hard, ours = (number(evaluation, m, "kl") for m in ("hard", "distilled"))
  if hard is None or ours is None:
    return f"There is no comparison to report: KL to the teacher was {kl.why}."
  if not (math.isfinite(hard) and math.isfinite(ours)):
    return (
      f"There is no result: the KL to the teacher is {text(ours)} for the distilled student "
      f"and {text(hard)} for the hard-label student."
    )
  pair = f"{ours:.3f} against {hard:.3f} nats a token"
  if abs(hard - ours) <= EQUAL * hard:
    first = f"Distillation made no difference in KL to the teacher: {pair}"
  elif ours < hard:
    first = (
      f"The distilled student ends nearer the teacher than its hard-label twin: KL {pair}, "
      f"{percent(kl.share)} of the gap closed"
    )
  else:
    first = f"The distilled student ends further from the teacher than its twin: KL {pair}"
  return f"{first}; {_cross_entropy_clause(evaluation)}."


def _cross_entropy_clause(evaluation: Mapping[str, Any]) -> str:
  hard, ours = (number(evaluation, m, "ce") for m in ("hard", "distilled"))
  if hard is None or ours is None or not (math.isfinite(hard) and math.isfinite(ours)):
    return f"its cross-entropy is {text(ours)} against {text(hard)}"
  if abs(hard - ours) <= EQUAL * hard:
    return f"cross-entropy is the same within {EQUAL:.0%} ({ours:.3f} against {hard:.3f})"
  word = "lower" if ours < hard else "higher"
  return f"its cross-entropy is {word} ({ours:.3f} against {hard:.3f})"
