"""Benchmarks of the student at the evaluations of its training (train.eval_benchmarks).

The cost: an evaluation copies the weights; see training/decoding_copy.py. The decoding programs are
compiled at the first evaluation.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distill_jax.config import Config
from distill_jax.errors import InputError, bad_value
from distill_jax.evals import benchmarks, generative, multiple_choice
from distill_jax.evals.model_slot import ModelSlot
from distill_jax.evals.questions import Questions, read_questions
from distill_jax.hub.tokenizer import check_vocabulary
from distill_jax.models import DecoderConfig, loading
from distill_jax.models.loading import ModelSource
from distill_jax.nn import sharding
from distill_jax.runtime import distributed, files, storage
from distill_jax.training import best
from distill_jax.training.decoding_copy import decoding_copy
from distill_jax.types import Model, PyTree

FOLDER = "evals"  # in the folder of a run: answers and grades, by step and benchmark
KEY = "train.eval_benchmarks"


class _InTraining(ModelSource):
  """The student in training. Its weights change, so they have no digest."""

  @property
  def identity(self) -> dict[str, str]:
    return {"name": self.name, "digest": "in training"}


class Benchmarks:
  """Runs the benchmarks in train.eval_benchmarks; a `training.heldout.Benchmarks`.

  Sampling has the settings in `evaluate` and `generate` and the seed of the run, as in the command
  `evaluate`, so that the weights of a step always get the same values.

  Args:
    config: The config of the run.
    workdir: The folder of the run. Answers and grades are written to evals/step-N/BENCHMARK in it.

  Raises:
    InputError: A benchmark is not in `evals`, its files or prompts cannot be used, or the student
      does not fit. No weights are read, and nothing is compiled.
  """

  def __init__(self, config: Config, workdir: Path):
    self._config, self._folder = config, workdir / FOLDER
    source = loading.open_source(config.student, config.seed)
    check(config, source)
    self._mesh = config.mesh.make()
    self._slot = ModelSlot(config.student, self._mesh, config.seed)
    self._slot.source = _InTraining(source.options, source.seed, source.pretrained, source.run)
    self._questions = {
      name: read_questions(name, config.evals[name], config.evaluate.on_bad)
      for name in config.train.eval_benchmarks
    }
    for questions in self._questions.values():
      self._check_fits(questions)

  def _check_fits(self, questions: Questions) -> None:
    """Raises InputError if a benchmark cannot be run on the student."""
    c, slot = self._config, self._slot
    if (benchmark := c.evals[questions.name]).judge() is not None:
      generative.check(c, slot, benchmark, questions)
      return
    sharding.check_batch("evaluate.batch_size", c.evaluate.batch_size, self._mesh)
    tokenizer, shape = slot.tokenizer(c.data), slot.source.decoder_config
    check_vocabulary(tokenizer.vocab_size, shape.vocab_size, tokenizer.where)
    multiple_choice.those_that_fit(shape.max_position_embeddings, tokenizer, questions)

  def __call__(self, step: int, trained: PyTree, base: Model | None) -> dict[str, float]:
    """Runs the benchmarks; returns the accuracies, the same on every process.

    What an interrupted evaluation has left is deleted: the config may have changed since.

    Args:
      step: Number of steps that are done.
      trained: The trained parameters.
      base: The base model of low-rank adapters, or None.
    """
    folder = self._folder / f"step-{step}"
    left = storage.location(folder)
    distributed.run_on_process_0(lambda: files.remove_tree(left))
    self._slot.hold(decoding_copy(self._slot.source, trained, base, self._mesh))
    try:
      rows = benchmarks.run(self._config, self._slot, self._questions, folder)
    finally:
      self._slot.release()
    values = np.zeros(len(rows))
    if distributed.is_process_0():  # the others do not judge answers
      scores = [row["acc"] if "acc" in row else row["pass@1"] for row in rows.values()]
      values = np.array([score["value"] for score in scores])
    # As integers, because jax would round float64.
    values = distributed.broadcast_from_process_0(values.view(np.int32)).view(np.float64)
    return dict(zip(map(best.of_benchmark, rows), values.tolist(), strict=True))


def check(config: Config, student: ModelSource) -> None:
  """Raises InputError if the benchmarks do not exist, or this student cannot be run on them."""
  names = config.train.eval_benchmarks
  if unknown := [name for name in names if name not in config.evals]:
    expected = f"names of benchmarks in evals ({', '.join(config.evals) or 'which is empty'})"
    raise bad_value(KEY, names, expected, f"Correct {unknown[0]!r}, or add it to evals")
  if not isinstance(student.config, DecoderConfig):
    raise InputError(
      f"{KEY} needs a student that continues texts, but {student.name} does not. Remove the key."
    )
  if config.mesh.context != 1:
    expected = f"1 with {KEY}, because texts are generated without the axis context"
    raise bad_value("mesh.context", config.mesh.context, expected, f"Set it to 1, or remove {KEY}")
