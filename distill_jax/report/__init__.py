"""What a run came to: the numbers, the sentence that they support, and one HTML page.

The sentence is computed, never written beforehand: it says better, equal, worse or not
measured, whichever is so. `page` draws; this module decides what is said.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_jax.errors import InputError
from distill_jax.report import benchmarks, page
from distill_jax.report.numbers import COLUMNS, percent, text
from distill_jax.runtime.atomic_io import atomic_write
from distill_jax.training.metric_writer import FILE, read_metrics, spell

MODELS = {
  "teacher": "Teacher",
  "start": "Student before",
  "hard": "Hard labels",
  "distilled": "Distilled",
}
EQUAL = 0.01  # of the hard-label student's number: a smaller difference is called none


@dataclasses.dataclass(frozen=True)
class Run:
  """A training run as its folder tells it."""

  rows: list[dict[str, float]]  # metrics.jsonl
  config: dict[str, Any]  # config.json
  versions: dict[str, Any]  # versions.json


@dataclasses.dataclass(frozen=True)
class Gap:
  """A difference, and how much of it the distilled student closed.

  `share` is None where there is no such gap or a number is missing; `why` then says so.
  """

  name: str
  meaning: str
  share: float | None
  why: str = ""


def number(evaluation: Mapping[str, Any], model: str, key: str) -> float | None:
  """One measured number; None where it was not measured. NaN stays NaN."""
  value = evaluation["models"].get(model, {}).get(key)
  if key == "agreement" and value is not None and (float(value) < 0 or float(value) > 1):
    raise InputError(f"{model}: agreement is {value}; it is a share between 0 and 1")
  return None if value is None else float(value)


def gaps(evaluation: Mapping[str, Any]) -> tuple[Gap, Gap, Gap]:
  """The shares of three gaps that distillation closed.

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


def _gap(name: str, whence: str, x: dict[str, float | None], meaning: str) -> Gap:
  a, b, goal = x[whence], x["distilled"], x["teacher"]
  if a is None or b is None or goal is None:
    missing = [MODELS[m] for m in (whence, "distilled", "teacher") if x[m] is None]
    return Gap(name, meaning, None, f"not measured: {', '.join(missing)}")
  if not all(map(math.isfinite, (a, b, goal))):
    return Gap(name, meaning, None, "a number is NaN or infinite")
  if a <= goal:
    return Gap(name, meaning, None, f"{MODELS[whence]} is already at the teacher: no gap to close")
  return Gap(name, meaning, (a - b) / (a - goal))


def summary(
  evaluation: Mapping[str, Any], records: Mapping[str, Any] | None = None, export_dir: str = ""
) -> dict[str, Any]:
  """The run in a few numbers, as strict JSON (design section 10).

  Returns:
    teacher, start, hard, distilled: each {ce, kl, agreement}; evals, where sets were
    evaluated; gap_closed (of KL),
    gap_closed_ce; bytes_per_token; export_dir. What was not measured, or is not defined,
    is None; NaN and infinities are strings, as in metrics.jsonl.
  """
  kl, ce, _ = gaps(evaluation)
  numbers: dict[str, Any] = {
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
  """One sentence: is the distilled student nearer the teacher than its hard-label twin?"""
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
  return f"{first}; {_on_ce(evaluation)}."


def _on_ce(evaluation: Mapping[str, Any]) -> str:
  hard, ours = (number(evaluation, m, "ce") for m in ("hard", "distilled"))
  if hard is None or ours is None or not (math.isfinite(hard) and math.isfinite(ours)):
    return f"its cross-entropy is {text(ours)} against {text(hard)}"
  if abs(hard - ours) <= EQUAL * hard:
    return f"cross-entropy is the same within {EQUAL:.0%} ({ours:.3f} against {hard:.3f})"
  word = "lower" if ours < hard else "higher"
  return f"its cross-entropy is {word} ({ours:.3f} against {hard:.3f})"


def report(
  workdir: str | Path,
  evaluation: Mapping[str, Any] | None = None,
  runs: Mapping[str, str | Path] | None = None,
  records: Mapping[str, Any] | None = None,
  export_dir: str = "",
  out: str = "report.html",
) -> dict[str, Any]:
  """Writes the page into `workdir` and returns `summary`.

  Args:
    workdir: where the page goes.
    evaluation: {"models": {name: numbers}, "tokens": n, "corpus": text, "evals": {set: {name:
      row}}}, of which the last, or all others, may be left out; without it,
      workdir/evaluation.json. Numbers of a model: ce, kl, entropy (nats a token),
      perplexity, agreement (0 to 1), parameters, bytes, tokens_per_second.
    runs: run folders by name; without it, each folder in workdir with a metrics.jsonl.
    records: {"kind", "n", "bytes_per_token", "entries_per_token", "vocab_size"}.
    export_dir: the exported Hugging Face folder.
    out: the page's file name.

  Raises:
    InputError: no evaluation, or one without models.
  """
  folder = Path(workdir)
  evaluation = _json(folder / "evaluation.json") if evaluation is None else evaluation
  measured, evals = evaluation.get("models"), evaluation.get("evals") or {}
  if not isinstance(measured, dict) or not (measured or evals):
    raise InputError(
      f"the evaluation for {folder} holds {sorted(evaluation)} and no models; run evaluate first"
    )
  if runs is None:
    runs = {p.parent.name: p.parent for p in sorted(folder.glob(f"*/{FILE}"))}
  order = [*MODELS, *runs]
  loaded = {n: _run(Path(runs[n])) for n in sorted(runs, key=order.index)}
  names = [*MODELS, *measured] if measured else []
  shown = {name: _numbers(evaluation, name) for name in names}
  html = page.render(
    headline=headline(evaluation) if measured else benchmarks.headline(evals),
    about=_about(evaluation) if measured else "The loss on held-out text was not measured.",
    labels={name: MODELS.get(name, name) for name in [*MODELS, *shown]},
    models=shown,
    gaps=gaps(evaluation),
    runs=loaded,
    records=records,
    export_dir=str(export_dir),
    commands=_commands(folder, loaded),
    evals=evals,
  )
  atomic_write(folder / out, html)
  return summary(evaluation, records, export_dir)


def _numbers(evaluation: Mapping[str, Any], model: str) -> dict[str, float | None]:
  return {key: number(evaluation, model, key) for key in COLUMNS}


def _about(evaluation: Mapping[str, Any]) -> str:
  tokens, corpus = evaluation.get("tokens"), evaluation.get("corpus")
  counted = "an unknown number of" if tokens is None else f"{int(tokens):,}"
  return f"Measured on {counted} held-out tokens" + (f" of {corpus}." if corpus else ".")


def _run(folder: Path) -> Run:
  versions = folder / "versions.json"
  return Run(
    read_metrics(folder),
    _json(folder / "config.json"),
    _json(versions) if versions.is_file() else {},
  )


def _commands(folder: Path, runs: Mapping[str, Run]) -> dict[str, str]:
  """The command of each run, and of each other step with a folder beside them, by time."""
  said = {p.parent.name: _json(p) for p in folder.glob("*/versions.json")}
  said |= {name: run.versions for name, run in runs.items()}
  names = sorted(said, key=lambda n: (str(said[n].get("started", "")), n))
  return {name: _command(said[name]) for name in names}


def _command(versions: Mapping[str, Any]) -> str:
  argv = list(versions.get("command") or ["(no command is recorded)"])
  return shlex.join([Path(argv[0]).name, *argv[1:]]) if len(argv) > 1 else argv[0]


def _json(path: Path) -> dict[str, Any]:
  try:
    tree = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError as e:
    raise InputError(f"{path} is not there; run the step that writes it first") from e
  except ValueError as e:
    raise InputError(f"{path} is not JSON ({e}); run the step that writes it again") from e
  if not isinstance(tree, dict):
    raise InputError(f"{path} holds a JSON {type(tree).__name__}; it must be one object")
  return tree
