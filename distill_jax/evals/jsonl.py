"""Any benchmark of one's own: rows of a JSON-lines, JSON or CSV file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from distill_jax.errors import InputError
from distill_jax.evals._base import BenchmarkRow, Choice, GenerativeBenchmark, PromptLine
from distill_jax.evals._option_letter import Judge, with_options
from distill_jax.evals._rows import LETTERS, field, find, make_choice, text
from distill_jax.filters import Filter, code, exact, math

SCORES = ("math", "exact", "code", "letter", "choice")


@dataclasses.dataclass(frozen=True)
class Benchmark(GenerativeBenchmark):
  r"""Questions from a file, by the names of its fields.

  Attributes:
    score: "math", answers that equal the key as mathematics; "exact", letter by letter; "code",
      programs that pass `test`, of HumanEval's form; "letter", the letter of an option, given in
      words; "choice", the likeliest choice, by log-likelihood.
    question_field: the question; of code, the beginning of the program.
    answer_field: the key of "math" and "exact".
    choices_field: of "letter" and "choice": a list of texts.
    label_field: of the same: the right one, its place from 0 on or its letter.
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
      raise InputError(
        f"the score of a jsonl benchmark is {self.score!r}; it can be one of {SCORES}"
      )
    self.judge()  # refuses what it does not know

  def files(self) -> list[Path]:
    return find(self.path, other="name the file there")

  def question(self, row: BenchmarkRow, number: int) -> Choice | PromptLine:
    question = text(row, self.question_field)
    if self.score == "choice":
      return self._choice(row, self.make_prompt(question))
    if self.score == "letter":
      choice = self._choice(row, question)
      options = [c.removeprefix(" ") for c in choice.choices]
      prompt = self.make_prompt(with_options(question, options))
      return {"prompt": prompt, "answer": LETTERS[choice.label]}
    prompt = self.make_prompt(question)
    if self.score == "code":
      test = {name: text(row, name) for name in ("test", "entry_point")}
      return {"prompt": prompt, "program": question, **test}
    return {"prompt": prompt, "answer": text(row, self.answer_field)}

  def _choice(self, row: BenchmarkRow, context: str) -> Choice:
    return make_choice(context, field(row, self.choices_field), field(row, self.label_field))

  def judge(self) -> Filter | None:
    match self.score:
      case "math":
        return math.Filter()
      case "exact":
        return exact.Filter(of=self.of)
      case "code":
        return code.Filter(prompt="program", isolated=self.isolated)
      case "letter":
        return Judge()
    return None
