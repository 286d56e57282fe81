"""MATH-500: 500 problems from MATH's test split (arXiv:2305.20050, arXiv:2103.03874)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from distill_jax.evals._base import BenchmarkRow, GenerativeBenchmark, PromptLine
from distill_jax.evals._rows import find, text
from distill_jax.filters import math

OTHER = "Download test.jsonl of HuggingFaceH4/MATH-500 and set it to that file"


@dataclasses.dataclass(frozen=True)
class Benchmark(GenerativeBenchmark):
  r"""MATH-500, from rows of {problem, answer}.

  A field `solution` with the answer in \boxed{…} may replace `answer`.
  """

  def files(self) -> list[Path]:
    return find(self.path, other=OTHER)

  def question(self, row: BenchmarkRow, number: int) -> PromptLine:
    prompt = self.make_prompt(text(row, "problem", "question"))
    return {"prompt": prompt, "answer": text(row, "answer", "solution")}

  def judge(self) -> math.Filter:
    return math.Filter()
