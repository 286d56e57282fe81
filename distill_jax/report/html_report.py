"""Reads the folders of a run and writes the HTML page."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_jax.errors import InputError
from distill_jax.report import benchmarks, page, results
from distill_jax.report.numbers import COLUMNS
from distill_jax.report.results import MODELS
from distill_jax.runtime import json_io
from distill_jax.runtime.atomic_io import atomic_write
from distill_jax.training.metric_writer import FILE, read_metrics
from distill_jax.types import JsonObject


@dataclasses.dataclass(frozen=True)
class ReportedRun:
  """A training run, read from its folder."""

  rows: list[dict[str, float]]  # metrics.jsonl
  config: JsonObject  # config.json
  versions: JsonObject  # versions.json


def write_report(
  workdir: str | Path,
  evaluation: Mapping[str, Any] | None = None,
  runs: Mapping[str, str | Path] | None = None,
  records: Mapping[str, Any] | None = None,
  export_dir: str = "",
  out: str = "report.html",
) -> JsonObject:
  """Writes the page into `workdir` and returns `results.summary`.

  Args:
    workdir: the folder for the page.
    evaluation: {"models": {name: numbers}, "tokens": n, "corpus": text, "evals": {benchmark:
      {name: row}}}. Either "evals" or the other three can be missing. The numbers of a model are
      ce, kl, entropy (nats per token), perplexity, agreement (0 to 1), parameters, bytes and
      tokens_per_second. None reads workdir/evaluation.json.
    runs: the run folders by name. None: each folder in workdir with a metrics.jsonl.
    records: {"kind", "n", "bytes_per_token", "entries_per_target", "vocab_size"}.
    export_dir: the exported Hugging Face folder.
    out: the file name of the page.

  Raises:
    InputError: The evaluation does not exist or has no models.
  """
  folder = Path(workdir)
  if evaluation is None:
    evaluation = _read(folder / "evaluation.json")
  measured, evals = evaluation.get("models"), evaluation.get("evals") or {}
  if not isinstance(measured, dict) or not (measured or evals):
    raise InputError(
      f"The evaluation for {folder} has {sorted(evaluation)} but no models. Run evaluate first."
    )
  loaded = _runs(folder, runs)
  # The hard-label student is optional; the other models of a run are shown even if not measured.
  has_hard = "hard" in (measured or {})
  names = [name for name in MODELS if has_hard or name != "hard"]
  models = {name: _numbers(evaluation, name) for name in [*names, *measured]} if measured else {}
  html = page.render(
    headline=results.headline(evaluation) if measured else benchmarks.headline(evals),
    summary=_about(evaluation) if measured else "The loss on held-out data was not measured.",
    labels={name: MODELS.get(name, name) for name in [*MODELS, *models]},
    models=models,
    gaps=[gap for gap in results.gaps(evaluation) if has_hard or gap.baseline != "hard"],
    runs=loaded,
    records=records,
    export_dir=str(export_dir),
    commands=_commands(folder, loaded),
    evals=evals,
  )
  atomic_write(folder / out, html)
  return results.summary(evaluation, records, export_dir)


def _runs(folder: Path, runs: Mapping[str, str | Path] | None) -> dict[str, ReportedRun]:
  """Reads the run folders: first those named in MODELS, in that order, then the others."""
  if runs is None:
    runs = {p.parent.name: p.parent for p in sorted(folder.glob(f"*/{FILE}"))}
  order = [*MODELS, *runs]
  return {name: _run(Path(runs[name])) for name in sorted(runs, key=order.index)}


def _run(folder: Path) -> ReportedRun:
  versions = folder / "versions.json"
  return ReportedRun(
    read_metrics(folder),
    _read(folder / "config.json"),
    _read(versions) if versions.is_file() else {},
  )


def _numbers(evaluation: Mapping[str, Any], model: str) -> dict[str, float | None]:
  return {key: results.number(evaluation, model, key) for key in COLUMNS}


def _about(evaluation: Mapping[str, Any]) -> str:
  tokens, corpus = evaluation.get("tokens"), results.corpus_name(evaluation)
  counted = "an unknown number of" if tokens is None else f"{int(tokens):,}"
  return f"Evaluated on {counted} held-out tokens" + (f" of {corpus}." if corpus else ".")


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
