"""The results of benchmarks such as GSM8K, for the page, the terminal and the model card."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from typing import Any

from distill_jax.report.numbers import cell, percent, tone

ModelScores = Mapping[str, Any]  # the results of one model on one benchmark, in evaluation.json
Evals = Mapping[str, Mapping[str, ModelScores]]  # by benchmark and model


def numbers(evals: Evals) -> Iterator[tuple[str, str]]:
  """Yields (benchmark, name of a number), e.g. ("gsm8k", "pass@1"), if any model has the number."""
  for name, rows in evals.items():
    keys = (key for row in rows.values() for key, v in row.items() if isinstance(v, dict))
    yield from ((name, number) for number in dict.fromkeys(keys))


def models_of(evals: Evals) -> list[str]:
  """Returns the models that were evaluated on at least one benchmark, in order."""
  return list(dict.fromkeys(model for rows in evals.values() for model in rows))


def value(row: ModelScores | None, number: str) -> str:
  """Formats a number with its interval, e.g. "12.5% (7.5% to 20.0%)"."""
  if row is None or number not in row:
    return "not measured"
  x = row[number]
  return f"{percent(x['value'])} ({percent(x['low'])} to {percent(x['high'])})"


def note(by_model: Mapping[str, ModelScores]) -> str:
  """Returns the sample sizes behind a benchmark's numbers, for the model with the fewest."""
  rows = [row for row in by_model.values() if row]
  if not rows:
    return ""
  parts = [f"{min(row['questions'] for row in rows)} questions"]
  if (n := max(row.get("samples", 0) for row in rows)) > 1:
    parts.append(f"{n:g} samples each")
  if left_out := max(row["left_out"] for row in rows):
    parts.append(f"{left_out} skipped")
  if cut_off := max(row.get("cut_off", 0.0) for row in rows):
    parts.append(f"up to {percent(cut_off)} of the answers truncated")
  return ", ".join(parts)


def headline(evals: Evals) -> str:
  """Returns the first number of the first benchmark for each model."""
  name, number = next(numbers(evals))
  values = {model: row[number]["value"] for model, row in evals[name].items() if number in row}
  return f"{name}, {number}: " + ", ".join(f"{model} {percent(x)}" for model, x in values.items())


def table(labels: Mapping[str, str], evals: Evals) -> str:
  """Returns the table of benchmarks for the page, in HTML."""
  models = models_of(evals)
  head = "".join(
    f'<th scope="col"><i class="dot {tone(m)}"></i>{html.escape(labels.get(m, m))}</th>'
    for m in models
  )
  body, last = "", ""
  for name, number in numbers(evals):
    small = f"<small>{html.escape(note(evals[name]))}</small>" if name != last else ""
    cells = "".join(f"<td>{cell(value(evals[name].get(m), number))}</td>" for m in models)
    body += f'<tr><th scope="row">{html.escape(f"{name} {number}")}{small}</th>{cells}</tr>'
    last = name
  return (
    '<p class="facts">Brackets: 95% bootstrap confidence interval over questions.</p>'
    f'<div class="wide"><table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody>'
    "</table></div>"
  )


def text(evaluation: Mapping[str, Any]) -> str:
  """Formats the content of an evaluation.json for the terminal.

  There is a line for each model, then a line for each number of each benchmark.
  """
  lines = []
  for model, row in evaluation["models"].items():
    lines.append(f"{model}: " + ", ".join(f"{name} {x:,.4g}" for name, x in row.items()))
  if texts := evaluation.get("texts"):
    lines.append(bits_per_byte(texts))
  evals = evaluation.get("evals", {})
  for name, number in numbers(evals):
    values = (f"{model} {value(row, number)}" for model, row in evals[name].items())
    lines.append(f"{name} {number}, {note(evals[name])}: " + "; ".join(values))
  return "\n".join(lines)


def bits_per_byte(texts: Mapping[str, Any]) -> str:
  """Returns the bits per byte of all models, given "texts" of an evaluation.json."""
  rows = (f"{model} {row['bits_per_byte']:.4f}" for model, row in texts["models"].items())
  return f"bits per byte, {texts['texts']:,} texts, {texts['bytes']:,} bytes: {'; '.join(rows)}"


def markdown(evals: Evals) -> list[str]:
  """Returns the lines of the table of benchmarks for a model card, in Markdown."""
  models = models_of(evals)
  lines = ["| benchmark | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
  for name, number in numbers(evals):
    cells = " | ".join(value(evals[name].get(m), number) for m in models)
    lines.append(f"| {name} {number}, {note(evals[name])} | {cells} |")
  return lines
