"""The results of a run: its numbers and the headline.

The headline is computed from the numbers: better, equal, worse or not measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from distill_jax.errors import bad_value
from distill_jax.report.numbers import percent, text
from distill_jax.training.metric_writer import spell
from distill_jax.types import JsonObject

MODELS = {
  "teacher": "Teacher",
  "start": "Before training",
  "hard": "Hard labels",
  "distilled": "Distilled",
}
EQUAL = 0.01  # differences below this fraction of the hard-label student's number count as equal


@dataclasses.dataclass(frozen=True)
class Gap:
  """A difference between a baseline and the teacher, and the part that distillation closed.

  Attributes:
    name: the title of the gap.
    baseline: the model at the start of the gap, "hard" or "start".
    meaning: a sentence about it.
    share: the fraction that was closed; None if the gap is not positive or a number is missing.
    why: the reason for None.
  """

  name: str
  baseline: str
  meaning: str
  share: float | None
  why: str = ""


def number(evaluation: Mapping[str, Any], model: str, key: str) -> float | None:
  """Returns one number of a model, or None if it was not measured."""
  value = evaluation["models"].get(model, {}).get(key)
  if key == "agreement" and value is not None and (float(value) < 0 or float(value) > 1):
    raise bad_value(f"{model}.agreement", value, "a number from 0 to 1", "Run evaluate again")
  return None if value is None else float(value)


def corpus_name(evaluation: Mapping[str, Any]) -> str:
  """Returns the name of the corpus, without the word that marks its held-out part."""
  return " ".join(str(evaluation.get("corpus") or "").removesuffix("heldout").split())


def gaps(evaluation: Mapping[str, Any]) -> tuple[Gap, Gap, Gap]:
  """Returns three gaps, with the fraction of each that distillation closed.

  The fractions are (kl_hard - kl_distilled) / kl_hard, (ce_hard - ce_distilled) / (ce_hard -
  ce_teacher) and (kl_start - kl_distilled) / kl_start. The teacher's KL to itself is 0.
  """
  kl = {m: number(evaluation, m, "kl") for m in MODELS} | {"teacher": 0.0}
  ce = {m: number(evaluation, m, "ce") for m in MODELS}
  return (
    _gap(
      "KL to the teacher, compared with hard labels",
      "hard",
      kl,
      "by how much the distilled student's KL to the teacher is below the hard-label student's",
    ),
    _gap(
      "Cross-entropy, compared with hard labels",
      "hard",
      ce,
      "the distilled student's position between the hard-label student (0%) and the teacher (100%)",
    ),
    _gap(
      "KL to the teacher, compared with before training",
      "start",
      kl,
      "by how much distillation has lowered the student's KL to the teacher",
    ),
  )


def _gap(name: str, baseline: str, x: dict[str, float | None], meaning: str) -> Gap:
  """Returns the gap from a baseline to the teacher; `x` has the numbers of the models."""
  start, ours, goal = x[baseline], x["distilled"], x["teacher"]
  if start is None or ours is None or goal is None:
    missing = [MODELS[m] for m in (baseline, "distilled", "teacher") if x[m] is None]
    return Gap(name, baseline, meaning, None, f"not measured: {', '.join(missing)}")
  if not all(map(math.isfinite, (start, ours, goal))):
    return Gap(name, baseline, meaning, None, "a number is NaN or infinite")
  if start <= goal:
    why = f"no gap to close: {MODELS[baseline]!r} is already as good as the teacher"
    return Gap(name, baseline, meaning, None, why)
  return Gap(name, baseline, meaning, (start - ours) / (start - goal))


def summary(
  evaluation: Mapping[str, Any], records: Mapping[str, Any] | None = None, export_dir: str = ""
) -> JsonObject:
  """Returns the main numbers of a run, as strict JSON.

  Returns:
    teacher, start, hard, distilled: {ce, kl, agreement} of each model; evals, if benchmarks were
    run; gap_closed (of KL), gap_closed_ce; bytes_per_token; export_dir. Missing and undefined
    numbers have the value None. NaN and infinities are strings, as in metrics.jsonl.
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
  """Returns one sentence that compares the distilled student with the hard-label student.

  Without a hard-label student, it compares the student before and after distillation.
  """
  kl, _, from_start = gaps(evaluation)
  start, hard, ours = (number(evaluation, m, "kl") for m in ("start", "hard", "distilled"))
  if hard is None and from_start.share is not None:
    change, closed = "raised", ""
    if from_start.share >= 0:
      change, closed = "lowered", f" ({percent(from_start.share)} of the gap closed)"
    return (
      f"Distillation has {change} the student's KL to the teacher from {start:.3f} to {ours:.3f} "
      f"nats per token{closed}."
    )
  if hard is None or ours is None:
    return f"The students cannot be compared: the KL to the teacher was {kl.why}."
  if not (math.isfinite(hard) and math.isfinite(ours)):
    return (
      f"The students cannot be compared: the KL to the teacher is {text(ours)} for the distilled "
      f"student and {text(hard)} for the hard-label student."
    )
  pair = f"KL {ours:.3f} vs. {hard:.3f} nats per token"
  if abs(hard - ours) <= EQUAL * hard:
    first = f"The distilled student is as close to the teacher as the hard-label student: {pair}"
  elif ours < hard:
    first = (
      f"The distilled student is closer to the teacher than the hard-label student: {pair}, "
      f"{percent(kl.share)} of the gap closed"
    )
  else:
    first = f"The distilled student is farther from the teacher than the hard-label student: {pair}"
  return f"{first}. {_cross_entropy_sentence(evaluation)}."


def _cross_entropy_sentence(evaluation: Mapping[str, Any]) -> str:
  hard, ours = (number(evaluation, m, "ce") for m in ("hard", "distilled"))
  if hard is None or ours is None or not (math.isfinite(hard) and math.isfinite(ours)):
    return f"Its cross-entropy is {text(ours)} vs. {text(hard)}"
  if abs(hard - ours) <= EQUAL * hard:
    return f"The cross-entropy is the same within {EQUAL:.0%} ({ours:.3f} vs. {hard:.3f})"
  word = "lower" if ours < hard else "higher"
  return f"Its cross-entropy is {word} ({ours:.3f} vs. {hard:.3f})"
