"""Any set of one's own: rows of a JSON-lines, JSON or CSV file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from distill_jax.errors import InputError
from distill_jax.evals._benchmark import (
  LETTERS,
  Choice,
  GenerativeBenchmark,
  Row,
  choice,
  field,
  find,
  text,
)
from distill_jax.evals._option_letter import Judge, options
from distill_jax.filters import code, exact, math

SCORES = ("math", "exact", "code", "letter", "choice")


@dataclasses.dataclass(frozen=True)
class Benchmark(GenerativeBenchmark):
  r"""Attributes:
  score: "math", answers that equal the key as mathematics; "exact", letter by letter; "code",
    programs that pass `test`, of HumanEval's form; "letter", the letter of a choice, said in
    words; "choice", the likeliest choice, by log-likelihood.
  question_field: what is asked; of code, how the program begins.
  answer_field: the key of "math" and "exact".
  choices_field, label_field: of "letter" and "choice": a list of texts, and which is right: its
    place from 0 on, or its letter.
  of: exact: what is compared: "text", "last line" or "final", see the exact filter.
  isolated: code: see the code filter.
  """

  prompt: str = "{question}"
  score: str = "math"
  question_field: str = "question"
  answer_field: str = "answer"
  choices_field: str = "choices"
  label_field: str = "label"
  of: str = "text"
  isolated: bool = True

  def __post_init__(self):
    super().__post_init__()
    if self.score not in SCORES:
      raise InputError(f"a jsonl set's score is {self.score!r}; it can be one of {SCORES}")
    self.judge()  # refuses what it does not know

  def files(self) -> list[Path]:
    return find(self.path, other="name the file there")

  def question(self, row: Row, number: int) -> dict[str, Any] | Choice:
    asked = text(row, self.question_field)
    if self.score in ("letter", "choice"):
      of = choice(self.ask(asked), field(row, self.choices_field), field(row, self.label_field))
      if self.score == "choice":
        return of
      texts = [c.removeprefix(" ") for c in of.choices]
      return {"prompt": self.ask(options(asked, texts)), "answer": LETTERS[of.label]}
    if self.score == "code":
      named = {name: text(row, name) for name in ("test", "entry_point")}
      return {"prompt": self.ask(asked), "program": asked, **named}
    return {"prompt": self.ask(asked), "answer": text(row, self.answer_field)}

  def judge(self) -> Any:
    return {
      "math": lambda: math.Filter(),
      "exact": lambda: exact.Filter(of=self.of),
      "code": lambda: code.Filter(prompt="program", isolated=self.isolated),
      "letter": lambda: Judge(),
      "choice": lambda: None,
    }[self.score]()
