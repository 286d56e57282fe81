"""`evaluate`: models on held-out data, beside their teacher, and on the benchmarks in `evals`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from distill_jax.config import Config
from distill_jax.errors import InputError
from distill_jax.evals import generative, heldout, multiple_choice
from distill_jax.evals.likelihood import Scorer
from distill_jax.evals.model_slot import ModelSlot
from distill_jax.evals.questions import Questions, read_questions
from distill_jax.models.options import ModelOptions
from distill_jax.nn import sharding
from distill_jax.nn.quantise import QuantiseOptions
from distill_jax.report.benchmarks import text  # noqa: F401
from distill_jax.runtime import distributed, json_io
from distill_jax.types import JsonObject

RESULTS = "evals"  # the folder of answers and verdicts, by model and benchmark


def run(config: Config, folder: Path) -> JsonObject:
  """Measures models on held-out data, where evaluate.heldout, and on the benchmarks in `evals`.

  Writes evaluation.json into the workdir and returns it (on the first process whole):

  models: by name ("teacher", "start", then those of evaluate.models), each with ce,
    perplexity, kl, agreement, accuracy, entropy, parameters, bytes and tokens_per_second
    (scoring, measured here), all on the same sequences, against the teacher's own pass.
  tokens, corpus: number of evaluated tokens, and the name of the corpus. With `tasks`, these are
    of the first, and `tasks` holds models and tokens of each; a token is a label. For contrastive
    tasks, ce, kl, agreement and accuracy are among the pairs of a batch, and recall is among all
    (evals/retrieval.py). Tasks of texts add bleu and chrf, or wer, against the references.
  evals: by the name of a benchmark, then of a model: questions, left_out and numbers, each
    {value, low, high}: see evals/generative.py and evals/multiple_choice.py, which write into
    evals/MODEL/BENCHMARK of the workdir. A benchmark needs no teacher, and each model has its own
    tokenizer.

  Raises:
    InputError: there is nothing to measure; config, models, data and benchmarks do not fit
      together.
    Preempted: SIGTERM was received while sampling; finished samples are kept.
  """
  models = check(config)
  mesh = sharding.make_mesh(**vars(config.mesh))
  sharding.check_batch("evaluate.batch_size", config.evaluate.batch_size, mesh)
  questions = {
    name: read_questions(name, benchmark, config.evaluate.on_bad)
    for name, benchmark in config.evals.items()
  }
  slots = {
    name: ModelSlot(options, mesh, config.seed, is_teacher=options is config.teacher)
    for name, options in all_models(config).items()
  }
  evaluation: JsonObject = {"models": {}}
  if config.evaluate.heldout:
    sources = {name: slot.source for name, slot in slots.items()}
    evaluation = heldout.measure(config, sources, mesh)
  if config.evals:
    results: dict[str, JsonObject] = {name: {} for name in config.evals}
    for model in models:
      rows = _run_benchmarks(config, slots[model], questions, folder / RESULTS / model)
      slots[model].release()
      for name, row in rows.items():
        results[name][model] = row
    evaluation["evals"] = results
  distributed.run_on_process_0(lambda: json_io.write_json(folder / "evaluation.json", evaluation))
  return evaluation


def check(config: Config) -> dict[str, ModelOptions]:
  """Refuses what cannot be measured, with nothing read; returns the models for the benchmarks."""
  if not config.evaluate.heldout and not config.evals:
    raise InputError(
      "evaluate.heldout is False and evals is empty: there is nothing to measure; add a benchmark "
      "as evals.gsm8k = config.benchmark('gsm8k')"
    )
  models = _benchmarked_models(config) if config.evals else {}
  _check_served(config, models)
  return models


def all_models(config: Config) -> dict[str, ModelOptions]:
  """The teacher, "start" and evaluate.models, by name."""
  plain = dataclasses.replace(
    config.student.as_trained(""), train="whole", quantise=QuantiseOptions()
  )
  others = {
    name: dataclasses.replace(plain, source=source)
    for name, source in config.evaluate.models.items()
  }
  return {"teacher": config.teacher, "start": config.student, **others}


def _benchmarked_models(config: Config) -> dict[str, ModelOptions]:
  """The models that the benchmarks run on."""
  known = all_models(config)
  names = config.evaluate.on or tuple(config.evaluate.models) or ("teacher",)
  if unknown := [name for name in names if name not in known]:
    raise InputError(
      f"evaluate.on names {unknown[0]!r}, which is no model here; they are {', '.join(known)}"
    )
  return {name: known[name] for name in names}


def _check_served(config: Config, benchmarked: Mapping[str, ModelOptions]) -> None:
  """Refuses what needs a model's likelihoods of a server."""
  served = [n for n, options in all_models(config).items() if generative.is_served(options)]
  if served and config.evaluate.heldout:
    raise InputError(
      f"model {served[0]!r} is a server, which does not say how likely it finds a text; "
      "set evaluate.heldout=False, or measure it by itself"
    )
  if config.generate.server.url:
    served.append("teacher")
  served = [name for name in served if name in benchmarked]
  for name, benchmark in config.evals.items():
    if benchmark.judge() is None and served:
      raise InputError(
        f"evals.{name} goes by the likelihood of its choices, which {served[0]!r}, a server, does "
        "not say; leave one of the two out, by evaluate.on"
      )


def _run_benchmarks(
  config: Config,
  model: ModelSlot,
  questions: Mapping[str, Questions],
  folder: Path,
) -> dict[str, JsonObject]:
  """One model on all benchmarks: first those of choices, since the others unroll its layers."""
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
