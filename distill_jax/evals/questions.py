"""The questions of a set, and those that cannot be used, with the reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from distill_jax.errors import InputError
from distill_jax.evals import _benchmark
from distill_jax.filters.samples import Judged, Sample, Unjudgeable
from distill_jax.runtime import distributed

ON_BAD = ("stop", "skip")


@dataclasses.dataclass
class Questions:
  """Attributes:
  name: of the set, in the config.
  on_bad: "stop" or "skip".
  good: (where it stands, the question): see evals/__init__.py.
  left_out: {"question": where it stands, "reason": …} of each of the others.
  """

  name: str
  on_bad: str
  good: list[tuple[str, Any]] = dataclasses.field(default_factory=list)
  left_out: list[dict[str, str]] = dataclasses.field(default_factory=list)

  def leave_out(self, where: str, why: str) -> None:
    """Raises: InputError: on_bad is "stop"."""
    if self.on_bad == "stop":
      raise InputError(f"evals.{self.name}: {where}: {why}; mend it, or set evaluate.on_bad=skip")
    self.left_out.append({"question": where, "reason": why})

  def check(self) -> None:
    """Raises: InputError: there is none left."""
    if not self.good:
      why = self.left_out[0] if self.left_out else {"question": "its file", "reason": "it is empty"}
      raise InputError(
        f"evals.{self.name} has no question that can be used; first: {why['question']}: "
        f"{why['reason']}"
      )


def read_questions(name: str, benchmark: Any, on_bad: str) -> Questions:
  """Reads the first `benchmark.limit` questions of a benchmark, and checks their answer keys.

  Raises:
    InputError: there is no file, or it is damaged; on_bad is "stop" and a question cannot be
      used, or none can.
  """
  if on_bad not in ON_BAD:
    raise InputError(f"evaluate.on_bad is {on_bad!r}; it can be one of {ON_BAD}")
  questions, number = Questions(name, on_bad), 0
  try:
    every = [row for file in benchmark.files() for row in _benchmark.rows(file)]
  except InputError as e:
    raise InputError(f"evals.{name}: {e}") from e
  for number, (where, raw) in enumerate(every[: benchmark.limit or None]):
    try:
      questions.good.append((where, benchmark.question(_benchmark.parse(raw), number)))
    except InputError as e:
      questions.leave_out(where, str(e))
  if (judge := benchmark.judge()) is not None and questions.good:
    _check_keys(judge, questions)
  questions.check()
  return questions


def _check_keys(judge: Any, questions: Questions) -> None:
  """Leaves out what cannot be judged, before a model is asked: judges read the key first."""
  why: list[str] = [""] * len(questions.good)

  def judge_nothing() -> None:
    empty = (
      {"id": i, "sample": 0, "text": "", "of": 1, "prompt": q["prompt"], "about": q}
      for i, (_, q) in enumerate(questions.good)
    )
    for sample, verdict in judged(judge, empty):
      if isinstance(verdict, Unjudgeable):
        why[sample["id"]] = verdict

  distributed.run_on_process_0(judge_nothing)
  bad = distributed.broadcast_from_process_0(np.array([bool(w) for w in why]))
  good, questions.good = questions.good, []
  for i, (where, question) in enumerate(good):
    if bad[i]:
      questions.leave_out(where, why[i])
    else:
      questions.good.append((where, question))


def judged(judge: Any, samples: Iterable[Sample]) -> Iterator[Judged]:
  """Each sample with the reason why it is wrong, or None."""
  return judge.select(iter(samples))
