"""Running several benchmarks on one model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from distill_jax.config import Config
from distill_jax.evals import generative, multiple_choice
from distill_jax.evals.likelihood import Scorer
from distill_jax.evals.model_slot import ModelSlot
from distill_jax.evals.questions import Questions
from distill_jax.types import JsonObject


def run(
  config: Config,
  model: ModelSlot,
  questions: Mapping[str, Questions],
  folder: Path,
) -> dict[str, JsonObject]:
  """Runs one model on all benchmarks; returns the results by benchmark.

  Multiple-choice benchmarks are first, because the others unroll the model's layers.
  """
  c = config.evaluate
  rows: dict[str, JsonObject] = {}
  choices = [name for name in questions if config.evals[name].judge() is None]
  if choices:
    tokenizer = model.tokenizer(config.data)
    scorer = Scorer(model.stacked(), model.mesh, tokenizer, c.batch_size, c.chunk)
    for name in choices:
      rows[name] = multiple_choice.measure(scorer, tokenizer, questions[name], folder / name)
    del scorer  # it holds the stacked layers
  for name in questions:
    if name not in choices:
      benchmark = config.evals[name]
      rows[name] = generative.measure(config, model, benchmark, questions[name], folder / name)
  return {name: rows[name] for name in questions}
