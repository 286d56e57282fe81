"""Examples of what models predict and generate: the content of examples.json.

`evaluate` writes the file, and `report` shows it. It has two parts:

  texts: held-out texts, token by token. Every token after the first has the predictions that each
    model made for its place: the probability of the token, the most probable tokens, and for
    students KL(teacher || student) in nats.
  generations: prompts, with the text that each model generates greedily.

A text has at most TOKENS tokens and STUDENTS students. A token takes about 250 bytes in the page
per model, so that three texts of three students take about 3 * 96 * 4 * 250 bytes = 288 kB; with
one student, 144 kB.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_jax.errors import InputError
from distill_jax.runtime import json_io, storage
from distill_jax.training.metric_writer import spell
from distill_jax.types import JsonObject

FILE = "examples.json"
TOKENS, STUDENTS, TOP = 96, 3, 5
TEACHER = "teacher"


@dataclasses.dataclass(frozen=True)
class Prediction:
  """The prediction of a model at one place of a text.

  Attributes:
    p: The probability of the text's token; None if it is unknown.
    top: The most probable tokens with their probabilities, in descending order.
    kl: KL(teacher || model) in nats, 0 for the teacher.
  """

  p: float | None
  top: tuple[tuple[str, float], ...]
  kl: float


@dataclasses.dataclass(frozen=True)
class Token:
  """A token of a text, and the models' predictions for its place; {} at the start of a document."""

  text: str
  predictions: Mapping[str, Prediction]


@dataclasses.dataclass(frozen=True)
class Generation:
  """A prompt and its continuations by model.

  Attributes:
    prompt: The prompt, a source text, or the name of a file.
    texts: The generated text of each model.
    reference: The expected text; "" without one.
  """

  prompt: str
  texts: Mapping[str, str]
  reference: str = ""


@dataclasses.dataclass(frozen=True)
class Examples:
  """The content of examples.json.

  Attributes:
    texts: Held-out texts as tokens.
    generations: The generations.
    samples: The number of samples from which the teacher's probabilities are estimated; 0 if they
      are exact.
  """

  texts: tuple[tuple[Token, ...], ...] = ()
  generations: tuple[Generation, ...] = ()
  samples: int = 0

  def to_json(self) -> JsonObject:
    """Returns the content of the file: strict JSON, with four digits of each number."""
    return _rounded(dataclasses.asdict(self))


def read(folder: Path) -> Examples:
  """Reads examples.json in a folder; returns empty examples if it does not exist.

  Raises:
    InputError: The file is broken.
  """
  path = storage.fetched(folder / FILE)
  if not path.is_file():
    return Examples()
  tree = json_io.read_object(path, "run evaluate again")
  try:
    return Examples(
      tuple(tuple(map(token_of, text)) for text in tree["texts"]),
      tuple(
        Generation(_text(g["prompt"]), _texts(g["texts"]), _text(g["reference"]))
        for g in tree["generations"]
      ),
      int(tree["samples"]),
    )
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    problem = f"{type(error).__name__}: {error}".rstrip(".")
    raise InputError(
      f"{path} does not hold examples as `evaluate` writes them ({problem}). Run evaluate again."
    ) from error


def token_of(tree: JsonObject) -> Token:
  """Returns a token of a file.

  Raises:
    KeyError, TypeError, ValueError, AttributeError: The tree has another form.
  """
  return Token(_text(tree["text"]), {m: _prediction(x) for m, x in tree["predictions"].items()})


def _prediction(tree: JsonObject) -> Prediction:
  top = tuple((_text(text), _probability(x)) for text, x in tree["top"])
  p = None if tree["p"] is None else _probability(tree["p"])
  return Prediction(p, top, float(tree["kl"]))


def _probability(x: Any) -> float:
  if 0 <= float(x) <= 1 or math.isnan(float(x)):
    return float(x)
  raise ValueError(f"A probability is {x}.")


def _texts(tree: JsonObject) -> dict[str, str]:
  return {model: _text(text) for model, text in tree.items()}


def _text(x: Any) -> str:
  if not isinstance(x, str):
    raise TypeError(f"A text is {x!r:.40}.")
  return x


def _rounded(tree: Any) -> Any:
  if isinstance(tree, dict):
    return {key: _rounded(x) for key, x in tree.items()}
  if isinstance(tree, (list, tuple)):
    return [_rounded(x) for x in tree]
  if isinstance(tree, float):
    return spell(float(f"{tree:.4g}")) if math.isfinite(tree) else spell(tree)
  return tree
