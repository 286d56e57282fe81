"""The result of `distill-jax distill` in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill_jax.report.numbers import percent
from distill_jax.report.numbers import text as number

ROWS = {"teacher": "teacher", "start": "student before", "distilled": "student after"}
COLUMNS = ("cross-entropy", "KL to teacher", "same first choice", "parameters")
SHOWN = 400  # characters of a sample


def text(result: Mapping[str, Any]) -> str:
  """Returns the table, a sample, the path of the student, and how to load a Hugging Face folder."""
  parts = [table(result["models"], result["tokens"])]
  if result["samples"]:
    parts.append(sample(_first_with_text(result["samples"])))
  student = f"The student is in {result['export_dir']}."
  if result["export_format"] == "hf":
    student += (
      " To use it with transformers:\n\n"
      "  from transformers import pipeline\n"
      f"  generate = pipeline('text-generation', model={str(result['export_dir'])!r})\n"
      "  print(generate('The')[0]['generated_text'])\n\n"
      "This needs `pip install transformers torch`."
    )
  parts.append(student)
  parts.append(f"Report: {result['report']}\nConfig: {result['config']}")
  return "\n\n".join(parts)


def table(models: Mapping[str, Mapping[str, float]], tokens: float) -> str:
  """Returns teacher and student as a table, before and after training."""
  lines = [f"On {tokens:,.0f} held-out tokens (cross-entropy and KL in nats per token):", ""]
  lines.append(" " * 16 + "".join(f"{column:>19}" for column in COLUMNS))
  for name, label in ROWS.items():
    if name in models:
      row = models[name]
      kl = "0" if name == "teacher" else number(row["kl"])
      cells = (number(row["ce"]), kl, percent(row["agreement"]), f"{row['parameters']:,.0f}")
      lines.append(f"{label:<16}" + "".join(f"{cell:>19}" for cell in cells))
  return "\n".join(lines)


def _first_with_text(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
  """Returns the first sample in which both continuations are more than white space, if any."""
  return next((row for row in rows if row["teacher"].strip() and row["student"].strip()), rows[0])


def sample(row: Mapping[str, Any]) -> str:
  """Returns a prompt with both continuations."""
  shown = {"prompt": row["prompt"], "teacher": row["teacher"], "student": row["student"]}
  lines = [f"  {name}:  {_short(text)}" for name, text in shown.items()]
  return "\n".join(["A held-out text, continued by both:", *lines])


def _short(text: Any) -> str:
  """Returns a text on one line, cut if it is long."""
  line = repr(str(text))
  return line if len(line) <= SHOWN else f"{line[:SHOWN]}…"
