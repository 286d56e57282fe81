"""The interface of a benchmark, and its questions."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_jax.errors import bad_value
from distill_jax.filters import SampleFilter
from distill_jax.types import JsonObject

# DeepSeek-R1's instruction for mathematics, from "Usage Recommendations" in its model card.
REASON = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."

BenchmarkRow = Mapping[str, Any]  # a row of a benchmark's file
# A line of a prompts.jsonl: `prompt`, and the fields that the judge reads, e.g. `answer`.
PromptLine = JsonObject


@dataclasses.dataclass(frozen=True)
class Choice:
  """A multiple-choice question: which of `choices` continues `context`.

  Attributes:
    context: The text before a choice.
    choices: The choices, each including the separator between context and choice.
    lengths: The length of each choice in characters, without the separator, for acc_norm.
    label: The index of the correct choice.
  """

  context: str
  choices: tuple[str, ...]
  lengths: tuple[int, ...]
  label: int


class Benchmark(abc.ABC):
  """A set of questions with answer keys: an entry of the config section `evals`."""

  path: str
  """File of questions, a folder of files, or package:NAME/FILE. "": the file in the installed
  package that contains the benchmark."""
  limit: int
  """Maximum number of questions; the first ones are used. 0: all."""

  @abc.abstractmethod
  def files(self) -> list[Path]:
    """Returns the files of the benchmark, local or in an installed package.

    Nothing is downloaded.

    Raises:
      InputError: If there is no such file.
    """

  @abc.abstractmethod
  def question(self, row: BenchmarkRow, number: int) -> Choice | PromptLine:
    """Returns the question in a row of the files.

    Args:
      row: The row.
      number: The index of the row, from 0.

    Raises:
      InputError: If the row lacks a field, or a field is malformed.
    """

  @abc.abstractmethod
  def judge(self) -> SampleFilter | None:
    """Returns the filter that accepts correct answers, or None for multiple-choice questions."""


@dataclasses.dataclass(frozen=True)
class GenerativeBenchmark(Benchmark):
  """A benchmark whose answers are generated texts."""

  path: str = ""
  """File of questions, a folder of files, or package:NAME/FILE. "": the file in the installed
  package that contains the benchmark, if there is one."""
  limit: int = 0
  """Maximum number of questions; the first ones are used. 0: all."""
  samples: int = 0
  """Number of samples per question. 0: evaluate.samples."""
  prompt: str = REASON
  """Template of the prompts; must contain {question}. With generate.chat, the prompt is a user's
  message. Without it, the model continues the prompt: use "{question}" or add solved examples."""
  stop: tuple[str, ...] = ()
  """Stop strings. (): generate.stop."""

  def __post_init__(self):
    if "{question}" not in self.prompt:
      raise bad_value(
        "prompt", self.prompt, "a template that contains {question}", "Add {question} to it"
      )
    for key in ("limit", "samples"):
      if (value := getattr(self, key)) < 0:
        raise bad_value(key, value, "0 or more", "Increase it")
    if not all(self.stop):
      raise bad_value("stop", self.stop, "strings that are not empty", "Remove the empty string")

  def make_prompt(self, question: str) -> str:
    """Returns the prompt for a question."""
    return self.prompt.replace("{question}", question)
