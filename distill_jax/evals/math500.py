"""MATH-500: 500 problems of MATH's test part (arXiv:2305.20050, arXiv:2103.03874)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from distill_jax.evals._base import BenchmarkRow, GenerativeBenchmark, PromptLine
from distill_jax.evals._rows import find, text
from distill_jax.filters import math

OTHER = "get test.jsonl of HuggingFaceH4/MATH-500, {problem, answer} rows, and name it there"


@dataclasses.dataclass(frozen=True)
class Benchmark(GenerativeBenchmark):
  """Rows of {problem, answer}; a worked solution with its answer in a box serves too."""

  def files(self) -> list[Path]:
    return find(self.path, other=OTHER)

  def question(self, row: BenchmarkRow, number: int) -> PromptLine:
    asked = self.make_prompt(text(row, "problem", "question"))
    return {"prompt": asked, "answer": text(row, "answer", "solution")}

  def judge(self) -> math.Filter:
    return math.Filter()
