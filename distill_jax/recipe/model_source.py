"""Recognises the models that --teacher and --student name."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from distill_jax.errors import InputError, bad_value
from distill_jax.models import DecoderConfig, loading
from distill_jax.models.loading import ModelSource
from distill_jax.models.options import ModelOptions
from distill_jax.models.runs import BEST, RUN
from distill_jax.nn import params
from distill_jax.report import numbers
from distill_jax.runtime import storage

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@\w[\w./-]*)?")
PREFIXES = ("hub:", "package:")
EXPECTED = "a Hugging Face folder, a .gguf file, a Hub id, package:NAME/PATH or run:WORKDIR"
FRACTIONS = {
  "three-quarters": 3 / 4,
  "two-thirds": 2 / 3,
  "half": 1 / 2,
  "third": 1 / 3,
  "quarter": 1 / 4,
}


@dataclasses.dataclass(frozen=True)
class Models:
  """The two models of a run, opened.

  Attributes:
    teacher: The teacher.
    student: The student before training.
    is_cut: True if the student consists of layers of the teacher.
  """

  teacher: ModelSource
  student: ModelSource
  is_cut: bool

  @property
  def max_positions(self) -> int:
    """The longest sequence that both models read."""
    configs = self.teacher.decoder_config, self.student.decoder_config
    return min(config.max_position_embeddings for config in configs)


def full_source(flag: str, given: str) -> str:
  """Returns the source that a config names for a model as the user wrote it.

  Args:
    flag: The flag, for errors.
    given: A path, a Hub id such as "Qwen/Qwen2.5-0.5B", or a source with a prefix.

  Raises:
    InputError: It is something else, or the path does not exist.
  """
  if given.startswith(PREFIXES) or storage.is_remote(given):
    return given
  folder = given.removeprefix(RUN).removesuffix(BEST)
  path, which = Path(folder).expanduser().absolute(), BEST if given.endswith(BEST) else ""
  if path.exists():
    is_run = (path / storage.CHECKPOINTS).is_dir() and not (path / "model.safetensors").exists()
    return f"{RUN}{path}{which}" if given.startswith(RUN) or is_run else str(path)
  if HUB_ID.fullmatch(given) and not given.endswith(".gguf"):
    return f"hub:{given}"
  fractions = f", or {', '.join(FRACTIONS)}" if flag == "--student" else ""
  raise bad_value(flag, given, EXPECTED + fractions, "Check the path")


def kept_layers(fraction: float, layers: int) -> tuple[int, ...]:
  """Returns the layers that a student keeps: the first quarter of them, the rest from the end."""
  kept = max(1, min(layers, round(fraction * layers)))
  first = max(1, round(kept / 4))
  return (*range(first), *range(layers - (kept - first), layers))


def open_decoder(flag: str, options: ModelOptions, seed: int) -> ModelSource:
  """Opens a model of a config.

  Args:
    flag: The flag that names it, for errors.
    options: The section of the config.
    seed: Random seed of the run.

  Raises:
    InputError: The model cannot be read, or is not a decoder-only language model.
  """
  source = loading.open_source(options, seed)
  if not isinstance(source.config, DecoderConfig):
    expected = "a decoder-only language model such as Llama, Qwen or Gemma"
    action = "Start from configs/sentiment.py, configs/fashion.py or another config for its task"
    raise bad_value(flag, f"{source.name}, a {source.family} model", expected, action)
  return source


def describe(source: ModelSource) -> str:
  """Returns e.g. "a llama model with 30 layers and 134.5 M parameters"."""
  layers = source.decoder_config.num_hidden_layers
  count = numbers.size(params.count(source.abstract))
  return f"a {source.family} model with {layers} layers and {count} parameters"


def check_not_a_run(source: str) -> None:
  """Refuses to take layers from a training run, which is loaded whole."""
  if source.startswith(RUN):
    raise InputError(
      f"--teacher is {source!r}, a training run; a student cannot be made of its layers. Export it "
      "and name the exported folder, or name a model with --student."
    )
