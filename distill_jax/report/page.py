"""The report as one HTML file of some tens of kilobytes, without external resources."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distill_jax.report import (
  benchmarks,
  charts,
  curves,
  deployment_view,
  examples_view,
  own_texts_view,
)
from distill_jax.report.deployment import Deployment
from distill_jax.report.examples import Examples
from distill_jax.report.numbers import COLUMNS, cell, percent, text, tone
from distill_jax.report.runs import ReportedRun, progress
from distill_jax.report.style import CSS

if TYPE_CHECKING:
  from distill_jax.report.results import Gap

escape = html.escape


def render(
  headline: str,
  summary: str,
  labels: Mapping[str, str],
  models: Mapping[str, Mapping[str, float | None]],
  gaps: Sequence[Gap],
  runs: Mapping[str, ReportedRun],
  records: Mapping[str, Any] | None,
  export_dir: str,
  commands: Mapping[str, str],
  evals: benchmarks.Evals,
  examples: Examples,
  deployed: Deployment | None,
  is_final: bool,
) -> str:
  """Returns the page.

  Args:
    headline: the title of the page.
    summary: the line below the title.
    labels: the displayed names of models and runs, by name.
    models: all numbers of the displayed models, None if not measured. If it is empty, the page has
      no sections about held-out data.
    gaps: the differences to show.
    runs: the training runs by name.
    records: the description of the records; None if unknown.
    export_dir: the exported folder, or "".
    commands: the commands of runs and other steps, by name.
    evals: the results of benchmarks.
    examples: predictions and generations of the models.
    deployed: what the student saves in files and in llama.cpp; None if it was not measured.
    is_final: False if there are runs that are not finished, or results that do not exist yet.
  """
  sections = [("Benchmarks", benchmarks.table(labels, evals))] if evals else []
  if models:
    sections = [
      ("Held-out results", charts.dots(labels, models) + _table(labels, models)),
      *sections,
      ("Gap to the teacher closed by distillation", _gaps(gaps)),
    ]
  if deployed is not None:
    sections.append((deployment_view.TITLE, deployment_view.section(deployed)))
  if not is_final and runs:
    sections.insert(0, ("Progress", _progress(labels, runs)))
  sections += [
    *examples_view.sections(labels, examples),
    *own_texts_view.sections(labels, runs),
    *curves.sections(labels, runs),
    ("Teacher records", _records(records)),
    ("Reproduce", _reproduce(labels, runs, commands, export_dir)),
  ]
  tiles = _tiles(labels, models, gaps, records) if models else ""
  body = "".join(f"<section><h2>{escape(name)}</h2>{part}</section>" for name, part in sections)
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta name="color-scheme" content="light dark">'
    f"<title>distill_jax report</title><style>{CSS}</style></head>\n<body><main><header>"
    f'<p class="kicker">distill_jax · report</p><h1>{escape(headline)}</h1>'
    f'<p class="about">{escape(summary)}</p>{tiles}</header>\n'
    f"{body}</main></body></html>\n"
  )


def _progress(labels: Mapping[str, str], runs: Mapping[str, ReportedRun]) -> str:
  """Returns a bar for each run, with its steps and the time that it still needs."""
  rows = ""
  for name, run in runs.items():
    done = run.done / run.total if run.total else float(run.is_finished)
    rows += (
      f'<div class="gap"><div><strong>{escape(labels.get(name, name))}</strong>'
      f"<small>{escape(progress(run))}</small></div>"
      f'<div class="bar {tone(name)}"><i style="width:{100 * min(done, 1):.1f}%"></i></div>'
      f"<b>{percent(done)}</b></div>"
    )
  return rows


def _tiles(
  labels: Mapping[str, str],
  models: Mapping[str, Mapping[str, float | None]],
  gaps: Sequence[Gap],
  records: Mapping[str, Any] | None,
) -> str:
  """Returns the four key figures below the title."""
  teacher, ours = models["teacher"], models["distilled"]

  def ratio(key: str) -> str:
    a, b = ours[key], teacher[key]
    return text(None) if a is None or b is None else f"{a / b:.2f}×" if b else "not defined"

  gap = gaps[-1] if gaps[0].share is None else gaps[0]  # both are of the KL
  tiles = [
    (
      percent(gap.share) if gap.share is not None else "—",
      f"of the KL gap to the teacher closed, compared with {labels[gap.baseline].lower()}",
    ),
    (ratio("parameters"), "the teacher's parameters"),
    (ratio("tokens_per_second"), "the teacher's tokens per second"),
    (text((records or {}).get("bytes_per_token"), 1), "bytes per token in the records"),
  ]
  return '<dl class="tiles">{}</dl>'.format(
    "".join(f"<div><dd>{cell(v)}</dd><dt>{escape(k)}</dt></div>" for v, k in tiles)
  )


def _table(labels: Mapping[str, str], models: Mapping[str, Mapping[str, float | None]]) -> str:
  head = "".join(
    f'<th scope="col"><i class="dot {tone(m)}"></i>{escape(labels[m])}</th>' for m in models
  )
  rows = ""
  for key, (name, note, write) in COLUMNS.items():
    cells = "".join(f"<td>{cell(write(numbers[key]))}</td>" for numbers in models.values())
    small = f"<small>{escape(note)}</small>" if note else ""
    rows += f'<tr><th scope="row">{escape(name)}{small}</th>{cells}</tr>'
  return (  # with five or more models the table scrolls sideways on a phone
    f'<div class="wide"><table class="results" style="--models:{len(models)}">'
    f"<thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
  )


def _gaps(gaps: Sequence[Gap]) -> str:
  rows = ""
  for gap in gaps:
    share = f"<b>{percent(gap.share)}</b>" if gap.share is not None else "<b>—</b>"
    note = gap.why or _in_words(gap.share)
    bar = 0.0 if gap.share is None else 100 * min(max(gap.share, 0.0), 1.0)
    rows += (
      f'<div class="gap"><div><strong>{escape(gap.name)}</strong>'
      f"<small>{escape(gap.meaning[0].upper() + gap.meaning[1:])}.</small></div>"
      f'<div class="bar distilled"><i style="width:{bar:.1f}%"></i></div>{share}'
      f"<em>{escape(note)}</em></div>"
    )
  return rows


def _in_words(share: float | None) -> str:
  if share is None:
    return ""
  if share < 0:
    return "the gap has grown"
  return "better than the teacher" if share > 1 else ""


def _records(records: Mapping[str, Any] | None) -> str:
  """Returns a table that compares the size of the records with full logits and with a top 64."""
  if not records or records.get("bytes_per_token") is None:
    problem = (records or {}).get("problem", "The size of the records was not measured.")
    return f'<p class="bad">{escape(problem)}</p>'
  ours, vocab = float(records["bytes_per_token"]), records.get("vocab_size")
  entries = records.get("entries_per_target")
  contents = f"Kind {records.get('kind')}, n = {records.get('n')}"
  if entries is not None:
    contents += f"; {text(float(entries), 1)} entries per target on average"
  costs = [("These records", ours), ("Top 64 as int32 ids and float32 log-probabilities", 64 * 8.0)]
  if vocab is not None:
    costs.append((f"All {int(vocab):,} logits as float32", 4.0 * int(vocab)))
  rows = "".join(
    f'<tr><th scope="row">{escape(name)}</th><td>{text(cost, 1 if cost < 1000 else 0)}</td>'
    f"<td>{f'{cost / ours:,.1f}×' if ours > 0 else 'not defined'}</td></tr>"
    for name, cost in costs
  )
  return (
    f'<p>{escape(contents)}.</p><table class="costs"><thead><tr><td></td><th>bytes per token</th>'
    f"<th>relative size</th></tr></thead><tbody>{rows}</tbody></table>"
  )


def _reproduce(
  labels: Mapping[str, str],
  runs: Mapping[str, ReportedRun],
  commands: Mapping[str, str],
  export_dir: str,
) -> str:
  parts = "".join(
    f"<h3>{escape(labels.get(name, name))}</h3><pre>{escape(command)}</pre>"
    for name, command in commands.items()
  )
  if export_dir:
    parts += f"<p>The exported student is in <code>{escape(export_dir)}</code>.</p>"
  for name, run in runs.items():
    versions = run.versions
    packages = ", ".join(f"{k} {v}" for k, v in versions.get("packages", {}).items())
    facts = [
      f"git {versions.get('git') or 'unknown'}",
      f"Python {versions.get('python', 'unknown')}",
      packages or "package versions unknown",
      str(versions.get("platform", "platform unknown")),
      f"started {versions.get('started', 'at an unknown time')}",
    ]
    config = json.dumps(run.config, indent=1, sort_keys=True)
    parts += (
      f"<details><summary>{escape(labels.get(name, name))}: config and versions</summary>"
      f'<p class="facts">{escape("; ".join(facts))}.</p><pre>{escape(config)}</pre></details>'
    )
  return parts or '<p class="bad">No run folder was found.</p>'
