"""Reading the questions of a benchmark; those that cannot be used are skipped with a reason."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from distill_jax.data.bad_input import BadInputPolicy
from distill_jax.errors import InputError
from distill_jax.evals import _rows
from distill_jax.evals._base import Benchmark, Choice, PromptLine
from distill_jax.filters import Sample, SampleFilter, Unjudgeable, judge_in_parallel
from distill_jax.runtime import distributed

ON_BAD = "evaluate.on_bad"  # the config key


class Question(NamedTuple):
  """A question that can be used.

  Attributes:
    where: The question's place, e.g. "FILE, line 3".
    content: A Choice for multiple-choice benchmarks, a PromptLine for generative ones.
  """

  where: str
  content: Any


@dataclasses.dataclass
class Questions:
  """The questions of a benchmark.

  Attributes:
    name: The name of the benchmark in the config.
    policy: The policy for questions that cannot be used.
    usable: The questions that can be used.
    left_out: {"question": its place, "reason": …} for each skipped question.
  """

  name: str
  policy: BadInputPolicy
  usable: list[Question] = dataclasses.field(default_factory=list)
  left_out: list[dict[str, str]] = dataclasses.field(default_factory=list)

  def add(self, where: str, content: Choice | PromptLine) -> None:
    """Adds a question that can be used; see `Question` for the arguments."""
    self.usable.append(Question(where, content))

  def skip(self, where: str, reason: str) -> None:
    """Skips a question.

    Args:
      where: The question's place.
      reason: The reason, a sentence.

    Raises:
      InputError: If evaluate.on_bad is "stop".
    """
    self.policy.reject(f"evals.{self.name}: {where}", reason)
    self.left_out.append({"question": where, "reason": reason})

  def check(self) -> None:
    """Raises InputError if no question can be used."""
    if self.usable:
      return
    if not self.left_out:
      raise InputError(f"The file of evals.{self.name} has no questions. Use another file.")
    place, reason = self.left_out[0]["question"], self.left_out[0]["reason"]
    raise InputError(
      f"evals.{self.name} has no question that can be used. The first is {place}: "
      f"{reason.rstrip('.')}."
    )


def read_questions(name: str, benchmark: Benchmark, on_bad: str) -> Questions:
  """Reads the first `benchmark.limit` questions of a benchmark and checks their answer keys.

  Args:
    name: The name of the benchmark in the config.
    benchmark: The benchmark.
    on_bad: "stop" at a question that cannot be used, or "skip" it.

  Raises:
    InputError: If the file is missing or damaged, if `on_bad` is "stop" and a question cannot be
      used, or if no question can be used.
  """
  questions = Questions(name, BadInputPolicy(ON_BAD, on_bad))
  try:
    rows = [row for file in benchmark.files() for row in _rows.rows(file)]
  except InputError as e:
    starts_with_key = str(e).startswith("path is ")
    raise InputError(f"evals.{name}{'.' if starts_with_key else ': '}{e}") from e
  for number, (where, raw) in enumerate(rows[: benchmark.limit or None]):
    try:
      questions.add(where, benchmark.question(_rows.parse(raw), number))
    except InputError as e:
      questions.skip(where, str(e))
  judge = benchmark.judge()
  if judge is not None and questions.usable:
    _check_keys(judge, questions)
  questions.check()
  return questions


def _check_keys(judge: SampleFilter, questions: Questions) -> None:
  """Skips questions whose answer key cannot be used, before any answer is sampled.

  Judges read the answer key first, so they are called with empty answers.
  """
  reasons = [""] * len(questions.usable)

  def judge_empty_answers() -> None:
    for sample, reason in judge_in_parallel(judge, map(_empty_answer, enumerate(questions.usable))):
      if isinstance(reason, Unjudgeable):
        reasons[sample["id"]] = reason

  distributed.run_on_process_0(judge_empty_answers)
  is_bad = distributed.broadcast_from_process_0(np.array([bool(reason) for reason in reasons]))
  candidates, questions.usable = questions.usable, []
  for i, (where, content) in enumerate(candidates):
    if is_bad[i]:
      questions.skip(where, reasons[i])
    else:
      questions.add(where, content)


def _empty_answer(numbered: tuple[int, Question]) -> Sample:
  number, question = numbered
  line = question.content
  prompt = line["prompt"]
  return {"id": number, "sample": 0, "text": "", "of": 1, "prompt": prompt, "about": line}
