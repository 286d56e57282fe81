"""MATH-500: 500 problems of MATH's test part (arXiv:2305.20050, arXiv:2103.03874)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from distill_jax.evals._benchmark import GenerativeBenchmark, Row, find, text
from distill_jax.filters import math

OTHER = "get test.jsonl of HuggingFaceH4/MATH-500, {problem, answer} rows, and name it there"


@dataclasses.dataclass(frozen=True)
class Benchmark(GenerativeBenchmark):
  """Rows of {problem, answer}; a worked solution with its answer in a box serves too."""

  def files(self) -> list[Path]:
    return find(self.path, other=OTHER)

  def question(self, row: Row, number: int) -> dict[str, Any]:
    asked = self.ask(text(row, "problem", "question"))
    return {"prompt": asked, "answer": text(row, "answer", "solution")}

  def judge(self) -> Any:
    return math.Filter()
