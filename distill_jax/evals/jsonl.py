"""Your own benchmark, from the rows of a JSON-lines, JSON or CSV file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from distill_jax.errors import bad_value
from distill_jax.evals._base import BenchmarkRow, Choice, GenerativeBenchmark, PromptLine
from distill_jax.evals._option_letter import Judge, with_options
from distill_jax.evals._rows import LETTERS, field, find, make_choice, text
from distill_jax.filters import SampleFilter, code, exact, math

SCORES = ("math", "exact", "code", "letter", "choice")


@dataclasses.dataclass(frozen=True)
class Benchmark(GenerativeBenchmark):
  """Questions from a file, whose fields are named by config keys."""

  prompt: str = "{question}"
  """Template of the prompts; must contain {question}."""
  score: str = "math"
  """Scoring: "math" (answers mathematically equal to the key), "exact" (answers that match the
  key's text), "code" (programs that pass the field `test`, as in HumanEval), "letter" (generated
  answers that name an option's letter), or "choice" (the most likely choice, by
  log-likelihood)."""
  question_field: str = "question"
  """Field that holds the question or, for "code", the beginning of the program."""
  answer_field: str = "answer"
  """Field that holds the answer key, for "math" and "exact"."""
  choices_field: str = "choices"
  """Field that holds the list of choices, for "letter" and "choice"."""
  label_field: str = "label"
  """Field that holds the correct choice's index (from 0) or letter, for "letter" and "choice"."""
  of: str = "text"
  """Part of the answer to compare, for "exact": "text", "last line" or "final" (see the filter
  `exact`)."""
  isolated: bool = True
  """True to run programs in Linux namespaces, for "code" (see the filter `code`)."""

  def __post_init__(self):
    super().__post_init__()
    if self.score not in SCORES:
      raise bad_value("score", self.score, f"one of {SCORES}", "Choose one of them")
    self.judge()  # raises for an invalid value of `of`

  def files(self) -> list[Path]:
    return find(self.path, other="Set it to the file of questions")

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

  def judge(self) -> SampleFilter | None:
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
