"""The questions of a benchmark, and those that cannot be used, with the reason."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from distill_jax.data.bad_input import BadInputPolicy
from distill_jax.errors import InputError
from distill_jax.evals import _rows
from distill_jax.evals._base import Benchmark, Choice, PromptLine
from distill_jax.filters import Filter, Sample, Unjudgeable
from distill_jax.runtime import distributed

ON_BAD = "evaluate.on_bad"  # the config key


class Question(NamedTuple):
  """A question that can be used.

  Attributes:
    where: its place, such as "FILE, line 3".
    content: a Choice; of generative benchmarks, the line of a prompts.jsonl.
  """

  where: str
  content: Any  # Choice | PromptLine, by the benchmark


@dataclasses.dataclass
class Questions:
  """The questions of a benchmark.

  Attributes:
    name: of the benchmark, in the config.
    policy: what happens at a question that cannot be used.
    usable: the questions.
    left_out: {"question": its place, "reason": …} of each of the others.
  """

  name: str
  policy: BadInputPolicy
  usable: list[Question] = dataclasses.field(default_factory=list)
  left_out: list[dict[str, str]] = dataclasses.field(default_factory=list)

  def add(self, where: str, content: Choice | PromptLine) -> None:
    self.usable.append(Question(where, content))

  def leave_out(self, where: str, reason: str) -> None:
    """Counts a question as left out.

    Raises:
      InputError: evaluate.on_bad is "stop".
    """
    self.policy.reject(f"evals.{self.name}: {where}", reason)
    self.left_out.append({"question": where, "reason": reason})

  def check(self) -> None:
    """Refuses a benchmark without a usable question."""
    if not self.usable:
      first = self.left_out[0] if self.left_out else None
      why = f"{first['question']}: {first['reason']}" if first else "its file: it is empty"
      raise InputError(f"evals.{self.name} has no question that can be used; first: {why}")


def read_questions(name: str, benchmark: Benchmark, on_bad: str) -> Questions:
  """Reads the first `benchmark.limit` questions of a benchmark, and checks their answer keys.

  Raises:
    InputError: there is no file, or it is damaged; on_bad is "stop" and a question cannot be
      used, or none can.
  """
  questions = Questions(name, BadInputPolicy(ON_BAD, on_bad))
  try:
    rows = [row for file in benchmark.files() for row in _rows.rows(file)]
  except InputError as e:
    raise InputError(f"evals.{name}: {e}") from e
  for number, (where, raw) in enumerate(rows[: benchmark.limit or None]):
    try:
      questions.add(where, benchmark.question(_rows.parse(raw), number))
    except InputError as e:
      questions.leave_out(where, str(e))
  judge = benchmark.judge()
  if judge is not None and questions.usable:
    _check_keys(judge, questions)
  questions.check()
  return questions


def _check_keys(judge: Filter, questions: Questions) -> None:
  """Leaves out questions that cannot be judged, before any is sampled.

  Judges read the answer key first, so they are given an empty answer.
  """
  reasons = [""] * len(questions.usable)

  def judge_empty_answers() -> None:
    for sample, reason in judge.select(map(_empty_answer, enumerate(questions.usable))):
      if isinstance(reason, Unjudgeable):
        reasons[sample["id"]] = reason

  distributed.run_on_process_0(judge_empty_answers)
  is_bad = distributed.broadcast_from_process_0(np.array([bool(reason) for reason in reasons]))
  candidates, questions.usable = questions.usable, []
  for i, (where, content) in enumerate(candidates):
    if is_bad[i]:
      questions.leave_out(where, reasons[i])
    else:
      questions.add(where, content)


def _empty_answer(numbered: tuple[int, Question]) -> Sample:
  number, question = numbered
  line = question.content
  prompt = line["prompt"]
  return {"id": number, "sample": 0, "text": "", "of": 1, "prompt": prompt, "about": line}
