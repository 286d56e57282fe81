"""What `evaluate` found on sets such as GSM8K, for the page and the model card."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from typing import Any

from distill_jax.report.numbers import cell, percent, tone

Evals = Mapping[str, Mapping[str, Mapping[str, Any]]]  # set: model: row of evaluation.json


def numbers(evals: Evals) -> Iterator[tuple[str, str]]:
  """(set, number) of each number that some model has, as ("gsm8k", "pass@1")."""
  for name, rows in evals.items():
    of_set = (k for row in rows.values() for k, v in row.items() if isinstance(v, dict))
    yield from ((name, number) for number in dict.fromkeys(of_set))


def value(row: Mapping[str, Any] | None, number: str) -> str:
  """A number with its interval, as "12.5% (7.5% to 20.0%)"."""
  if row is None or number not in row:
    return "not measured"
  x = row[number]
  return f"{percent(x['value'])} ({percent(x['low'])} to {percent(x['high'])})"


def note(rows: Mapping[str, Mapping[str, Any]]) -> str:
  """How much a set's numbers rest on; the worst of the models."""
  some = [row for row in rows.values() if row]
  if not some:
    return ""
  parts = [f"{min(row['questions'] for row in some)} questions"]
  if (n := max(row.get("samples", 0) for row in some)) > 1:
    parts.append(f"{n:g} samples each")
  if left := max(row["left_out"] for row in some):
    parts.append(f"{left} left out")
  if cut := max(row.get("cut_off", 0.0) for row in some):
    parts.append(f"up to {percent(cut)} of the answers cut off")
  return ", ".join(parts)


def headline(evals: Evals) -> str:
  """The first number of the first set, of each model."""
  name, number = next(numbers(evals))
  found = {m: row[number] for m, row in evals[name].items() if number in row}
  return f"{name}, {number}: " + ", ".join(f"{m} {percent(x['value'])}" for m, x in found.items())


def table(labels: Mapping[str, str], evals: Evals) -> str:
  models = list(dict.fromkeys(m for rows in evals.values() for m in rows))
  head = "".join(
    f'<th scope="col"><i class="dot {tone(m)}"></i>{html.escape(labels.get(m, m))}</th>'
    for m in models
  )
  body, before = "", ""
  for name, number in numbers(evals):
    small = f"<small>{html.escape(note(evals[name]))}</small>" if name != before else ""
    cells = "".join(f"<td>{cell(value(evals[name].get(m), number))}</td>" for m in models)
    body += f'<tr><th scope="row">{html.escape(f"{name} {number}")}{small}</th>{cells}</tr>'
    before = name
  return (
    '<p class="facts">In brackets what holds 95% of the means over questions drawn again.</p>'
    f'<div class="wide"><table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody>'
    "</table></div>"
  )


def text(evaluation: Mapping[str, Any]) -> str:
  """An evaluation.json for a person: a line a model, then a line a number of a set."""
  lines = []
  for model, row in evaluation["models"].items():
    lines.append(f"{model}: " + ", ".join(f"{name} {x:,.4g}" for name, x in row.items()))
  evals = evaluation.get("evals", {})
  for name, number in numbers(evals):
    said = (f"{model} {value(row, number)}" for model, row in evals[name].items())
    lines.append(f"{name} {number}, {note(evals[name])}: " + "; ".join(said))
  return "\n".join(lines)


def markdown(evals: Evals) -> list[str]:
  """Lines for a model card."""
  models = list(dict.fromkeys(m for rows in evals.values() for m in rows))
  lines = ["| set | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
  for name, number in numbers(evals):
    cells = " | ".join(value(evals[name].get(m), number) for m in models)
    lines.append(f"| {name} {number}, {note(evals[name])} | {cells} |")
  return lines
