"""Reads the folders of a run and writes the HTML page."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_jax.errors import InputError
from distill_jax.report import benchmarks, deployment, examples, page, results
from distill_jax.report.numbers import COLUMNS
from distill_jax.report.results import MODELS
from distill_jax.report.runs import ReportedRun, progress, read_runs
from distill_jax.runtime import json_io, storage
from distill_jax.runtime.atomic_io import atomic_write
from distill_jax.training.metric_writer import FILE
from distill_jax.types import JsonObject


def write_report(
  workdir: str | Path,
  evaluation: Mapping[str, Any] | None = None,
  runs: Mapping[str, str | Path] | None = None,
  records: Mapping[str, Any] | None = None,
  export_dir: str = "",
  out: str = "report.html",
  now: datetime.datetime | None = None,
) -> JsonObject:
  """Writes the page into `workdir` and returns `results.summary`.

  It shows examples.json and deployment.json of the workdir too, if they exist.

  While runs are going, it is the page so far: runs that are not finished are shown with their
  progress, and results that do not exist yet are omitted.

  Args:
    workdir: the folder for the page.
    evaluation: {"models": {name: numbers}, "tokens": n, "corpus": text, "evals": {benchmark:
      {name: row}}}. Either "evals" or the other three can be missing. The numbers of a model are
      ce, kl, entropy (nats per token), perplexity, agreement (0 to 1), parameters, bytes and
      tokens_per_second. None reads workdir/evaluation.json if it exists.
    runs: the run folders by name, which need not exist yet. None: each folder in workdir with a
      metrics.jsonl.
    records: {"kind", "n", "bytes_per_token", "entries_per_target", "vocab_size"}, or {"problem":
      a sentence}.
    export_dir: the exported Hugging Face folder.
    out: the file name of the page.
    now: the time of an unfinished page; None for the present.

  Raises:
    InputError: There is neither an evaluation nor a run that has begun, or a file is broken.
  """
  folder = Path(workdir)
  if runs is None:
    runs = {p.parent.name: p.parent for p in sorted(folder.glob(f"*/{FILE}"))}
  loaded = read_runs(runs)
  evaluation = evaluation if evaluation is not None else _evaluation(folder)
  measured, evals = evaluation.get("models"), evaluation.get("evals") or {}
  if evaluation and not isinstance(measured, dict):
    raise InputError(
      f"The evaluation for {folder} has {sorted(evaluation)} but no models. Run evaluate first."
    )
  if not evaluation and not any(run.rows for run in loaded.values()):
    raise InputError(
      f"{storage.location(folder)} has no evaluation.json, and none of its runs "
      f"({', '.join(loaded) or 'none is known'}) has finished a step. Name the workdir of "
      "`evaluate`, or train first."
    )
  evaluation = {"models": {}, **evaluation}
  # The hard-label student is optional; the other models of a run are shown even if not measured.
  has_hard = "hard" in (measured or {})
  names = [name for name in MODELS if has_hard or name != "hard"]
  models = {name: _numbers(evaluation, name) for name in [*names, *measured]} if measured else {}
  is_measured = bool(measured or evals or evaluation.get("texts"))
  is_final = is_measured and all(run.is_finished for run in loaded.values())
  now = now or datetime.datetime.now(datetime.UTC)
  html = page.render(
    headline=_headline(evaluation, loaded),
    summary=_about(evaluation) + ("" if is_final else f" As of {now:%Y-%m-%d %H:%M %Z}."),
    labels={name: MODELS.get(name, name) for name in [*MODELS, *loaded, *models]},
    models=models,
    gaps=[gap for gap in results.gaps(evaluation) if has_hard or gap.baseline != "hard"],
    runs=loaded,
    records=records,
    export_dir=str(export_dir),
    commands=_commands(folder, loaded),
    evals=evals,
    examples=examples.read(folder),
    deployed=_deployment(folder),
    is_final=is_final,
  )
  atomic_write(folder / out, html)
  return results.summary(evaluation, records, export_dir)


def _evaluation(folder: Path) -> JsonObject:
  """Returns the content of evaluation.json; {} before `evaluate` has finished."""
  path = storage.fetched(folder / "evaluation.json")
  return _read(path) if path.is_file() else {}


def _deployment(folder: Path) -> deployment.Deployment | None:
  """Returns the content of deployment.json; None if no file of the student was measured."""
  path = storage.fetched(folder / deployment.FILE)
  return deployment.read(path) if path.is_file() else None


def _headline(evaluation: Mapping[str, Any], runs: Mapping[str, ReportedRun]) -> str:
  """Returns the title of the page: the main result, or the progress of the run that is going."""
  if evaluation["models"]:
    return results.headline(evaluation)
  if texts := evaluation.get("texts"):
    return benchmarks.bits_per_byte(texts).capitalize()
  if evaluation.get("evals"):
    return benchmarks.headline(evaluation["evals"])
  going = [(name, run) for name, run in runs.items() if run.rows and not run.is_finished]
  if not going:
    return "The runs that have begun are finished, and their models have not been evaluated yet"
  name, run = going[-1]
  return f"{MODELS.get(name, name)}: {progress(run)}"


def _numbers(evaluation: Mapping[str, Any], model: str) -> dict[str, float | None]:
  return {key: results.number(evaluation, model, key) for key in COLUMNS}


def _about(evaluation: Mapping[str, Any]) -> str:
  if not evaluation["models"]:
    is_measured = "evals" in evaluation or "texts" in evaluation
    return "The loss on held-out data was not measured" + ("." if is_measured else " yet.")
  tokens, corpus = evaluation.get("tokens"), results.corpus_name(evaluation)
  counted = "an unknown number of" if tokens is None else f"{int(tokens):,}"
  about = f"Evaluated on {counted} held-out tokens" + (f" of {corpus}." if corpus else ".")
  texts = evaluation.get("texts")
  return f"{about} {benchmarks.bits_per_byte(texts).capitalize()}." if texts else about


def _commands(folder: Path, runs: Mapping[str, ReportedRun]) -> dict[str, str]:
  """Returns the commands of the runs and of all other steps in `folder`, by name, in time order."""
  versions = {p.parent.name: _read(p) for p in folder.glob("*/versions.json")}
  versions |= {name: run.versions for name, run in runs.items()}
  names = sorted(versions, key=lambda name: (str(versions[name].get("started", "")), name))
  return {name: _command(versions[name]) for name in names}


def _command(versions: Mapping[str, Any]) -> str:
  argv = list(versions.get("command") or ["(the command is unknown)"])
  return shlex.join([Path(argv[0]).name, *argv[1:]]) if len(argv) > 1 else argv[0]


def _read(path: Path) -> JsonObject:
  return json_io.read_object(path, "run the step that writes it again")
