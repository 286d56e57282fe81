"""The contract of a benchmark and of its questions."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_jax.errors import InputError
from distill_jax.filters import Filter
from distill_jax.types import JsonObject

# DeepSeek-R1's instruction for mathematics (its model card's "Usage Recommendations").
REASON = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."

BenchmarkRow = Mapping[str, Any]  # of a benchmark's file
# The line of a prompts.jsonl: `prompt`, and the fields that the judge reads, such as `answer`.
PromptLine = JsonObject


@dataclasses.dataclass(frozen=True)
class Choice:
  """A question whose answer is one of `choices`: the one that best continues `context`.

  Attributes:
    lengths: of the choices in characters, for acc_norm, without what joins them to the context.
    label: the right choice, from 0 on.
  """

  context: str
  choices: tuple[str, ...]
  lengths: tuple[int, ...]
  label: int


class Benchmark(abc.ABC):
  """A set of questions with answer keys, as one entry of `evals` names it.

  Attributes:
    path: the file, a folder of files, or package:NAME/FILE; "": in the package that has it.
    limit: the first so many questions; 0: all.
  """

  path: str
  limit: int

  @abc.abstractmethod
  def files(self) -> list[Path]:
    """Returns the files of the benchmark, here or in an installed package; none is downloaded.

    Raises:
      InputError: there is none.
    """

  @abc.abstractmethod
  def question(self, row: BenchmarkRow, number: int) -> Choice | PromptLine:
    """Returns a row of the files as a question.

    Args:
      number: of the row, from 0 on.

    Raises:
      InputError: the row lacks a field, or a field is malformed.
    """

  @abc.abstractmethod
  def judge(self) -> Filter | None:
    """Returns the filter that accepts right answers; None for choices, which need none."""


@dataclasses.dataclass(frozen=True)
class GenerativeBenchmark(Benchmark):
  """The keys of every benchmark that is answered in words.

  Attributes:
    path, limit: see Benchmark.
    samples: of each question; 0: evaluate.samples.
    prompt: the prompt of a question, {question}. With generate.chat it is a user's message;
      without, "{question}" alone or a few worked examples suit.
    stop: strings that end an answer; (): generate.stop.
  """

  path: str = ""
  limit: int = 0
  samples: int = 0
  prompt: str = REASON
  stop: tuple[str, ...] = ()

  def __post_init__(self):
    if "{question}" not in self.prompt:
      raise InputError(
        f"a benchmark's prompt is {self.prompt!r:.60}; it needs a {{question}} in it"
      )
    if self.limit < 0 or self.samples < 0:
      raise InputError(
        f"a benchmark's limit is {self.limit} and samples {self.samples}; 0 or more each"
      )
    if not all(self.stop):
      raise InputError(
        "a benchmark's stop holds an empty string, which ends every text; leave it out"
      )

  def make_prompt(self, question: str) -> str:
    """Returns the prompt of a question."""
    return self.prompt.replace("{question}", question)
