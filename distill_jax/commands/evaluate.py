"""Evaluates the teacher and the students on held-out data and on benchmarks.

Reads: the teacher, the student before training ("start"), and the models in evaluate.models; the
held-out part of `data` or `tasks`; and the files of the benchmarks in `evals`.

Writes: evaluation.json in the workdir, and examples.json with predictions and generations of all
models side by side, if evaluate.examples. For benchmarks, also the generated answers and their
grades, in evals/MODEL/BENCHMARK of the workdir. Finished samples are kept when the command is
interrupted.

Config: seed, mesh, teacher, student, data, evaluate, evals, generate, tasks.

Example:
  distill-jax evaluate --config=configs/demo.py --workdir=runs/demo
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

import jax

from distill_jax.config import Config
from distill_jax.errors import InputError, bad_value
from distill_jax.evals import benchmarks, bits_per_byte, generative, heldout, side_by_side
from distill_jax.evals.model_slot import ModelSlot
from distill_jax.evals.questions import read_questions
from distill_jax.models.options import ModelOptions
from distill_jax.nn import sharding
from distill_jax.nn.quantise import QuantiseOptions
from distill_jax.report import examples
from distill_jax.report.benchmarks import text  # noqa: F401
from distill_jax.runtime import distributed, json_io
from distill_jax.types import JsonObject

RESULTS = "evals"  # the folder of answers and grades, by model and benchmark


def run(config: Config, folder: Path) -> JsonObject:
  """Evaluates models on held-out data, if evaluate.heldout, and on the benchmarks in `evals`.

  Returns:
    The content of evaluation.json, which it writes into the workdir; on other processes than the
    first parts can be missing:

    models: by name ("teacher", "start", then those in evaluate.models): ce, perplexity, kl,
      agreement, accuracy, entropy, parameters, bytes and tokens_per_second (of scoring, on this
      machine). All are evaluated on the same sequences; kl and agreement compare with the teacher's
      outputs on them.
    tokens, corpus: number of evaluated tokens, and the corpus name. With `tasks`, a token is a
      label, both describe the first task, and `tasks` has the models and tokens of each. For
      contrastive tasks, ce, kl, agreement and accuracy are computed within a batch, and recall over
      all pairs (evals/retrieval.py). Text-generation tasks add bleu and chrf, or wer, against the
      references.
    texts: bits per byte of the same held-out texts, by model, also for models with different
      tokenizers; see evals/bits_per_byte.py.
    evals: by benchmark and model: questions, left_out, and numbers as {value, low, high}; see
      evals/generative.py and evals/multiple_choice.py. Benchmarks do not use the teacher, and each
      model has its own tokenizer.

  Raises:
    InputError: There is nothing to evaluate, or config, models, data and benchmarks do not fit
      together.
    Preempted: SIGTERM was received while sampling; finished samples are kept.
  """
  models = check(config)
  axes = config.mesh.whole_rows() if config.evals or config.tasks else config.mesh
  mesh = axes.make()
  sharding.check_batch("evaluate.batch_size", config.evaluate.batch_size, mesh)
  questions = {
    name: read_questions(name, benchmark, config.evaluate.on_bad)
    for name, benchmark in config.evals.items()
  }
  whole_rows = config.mesh.whole_rows().make()  # to generate on
  slots = {
    name: ModelSlot(options, whole_rows, config.seed, is_teacher=options is config.teacher)
    for name, options in all_models(config).items()
  }
  evaluation: JsonObject = {"models": {}}
  found, shown = examples.Examples(), slots
  if config.evaluate.heldout:
    sources = {name: slot.source for name, slot in slots.items()}
    evaluation, found = heldout.measure(config, heldout.comparable(config, sources), mesh)
  elif _shows_records(config):
    students = {n: slot for n, slot in slots.items() if n != "teacher"}
    shown = {n: slot for n, slot in students.items() if not generative.is_served(slot.options)}
    found = heldout.recorded(config, {n: slot.source for n, slot in shown.items()}, mesh)
  if config.evaluate.texts:
    evaluation["texts"] = bits_per_byte.measure(config, slots)
  if config.evals:
    results: dict[str, JsonObject] = {name: {} for name in config.evals}
    for model in models:
      rows = benchmarks.run(config, slots[model], questions, folder / RESULTS / model)
      slots[model].release()
      for name, row in rows.items():
        results[name][model] = row
    evaluation["evals"] = results
  json_io.write_json_once(folder / "evaluation.json", evaluation)
  if found.texts:  # of models that continue texts; others have no generations, or have them already
    found = dataclasses.replace(found, generations=tuple(_generations(config, shown, whole_rows)))
  # A file of an earlier evaluation would not belong to this one.
  json_io.write_json_once(folder / examples.FILE, found.to_json())
  return evaluation


def _generations(
  config: Config, models: Mapping[str, ModelSlot], mesh: jax.sharding.Mesh
) -> list[examples.Generation]:
  """Returns continuations by all models; none if no prompt can be made from held-out data."""
  try:
    return side_by_side.generate(config, models, mesh)
  except InputError as error:
    if config.evaluate.prompts:
      raise
    if distributed.is_process_0():
      print(f"{examples.FILE} has no generations: {error}", file=sys.stderr)
    return []


def _shows_records(config: Config) -> bool:
  """Returns True if examples are made without the teacher, from a held-out store of text."""
  c = config.evaluate
  return bool(not c.heldout and c.examples and config.train.heldout and not config.tasks)


def check(config: Config) -> dict[str, ModelOptions]:
  """Checks the config without reading a model or data; returns the models for the benchmarks.

  Raises:
    InputError: There is nothing to evaluate, or a model cannot be evaluated.
  """
  c = config.evaluate
  if not c.heldout and not c.texts and not config.evals and not _shows_records(config):
    raise bad_value(
      "evaluate.heldout",
      False,
      "True, or a benchmark in evals, because there is nothing to evaluate",
      "Add a benchmark, e.g. c.evals.gsm8k = config.benchmark('gsm8k')",
    )
  models = _benchmarked_models(config) if config.evals else {}
  _check_served(config, models)
  return models


def all_models(config: Config) -> dict[str, ModelOptions]:
  """Returns the models by name: "teacher", "start" and those in evaluate.models."""
  plain = dataclasses.replace(
    config.student.as_trained(""), train="whole", quantise=QuantiseOptions()
  )
  others = {
    name: dataclasses.replace(plain, source=source)
    for name, source in config.evaluate.models.items()
  }
  return {"teacher": config.teacher, "start": config.student, **others}


def _benchmarked_models(config: Config) -> dict[str, ModelOptions]:
  """Returns the models to run the benchmarks on, by name."""
  known = all_models(config)
  names = config.evaluate.on or tuple(config.evaluate.models) or ("teacher",)
  if unknown := [name for name in names if name not in known]:
    expected = f"names of models ({', '.join(known)})"
    raise bad_value("evaluate.on", names, expected, f"Correct {unknown[0]!r}")
  return {name: known[name] for name in names}


def _check_served(config: Config, benchmarked: Mapping[str, ModelOptions]) -> None:
  """Raises InputError if a served model is to be evaluated by likelihood, which servers lack."""
  served = [n for n, options in all_models(config).items() if generative.is_served(options)]
  for key, unset in (("heldout", False), ("texts", 0)):
    if served and (value := getattr(config.evaluate, key)):
      raise bad_value(
        f"evaluate.{key}",
        value,
        f"{unset}, because {served[0]!r} is served and servers do not return the likelihood of a "
        "text",
        f"Set it to {unset}, or remove that model",
      )
  if config.generate.server.urls:
    served.append("teacher")
  served = [name for name in served if name in benchmarked]
  for name, benchmark in config.evals.items():
    if benchmark.judge() is None and served:
      raise bad_value(
        "evaluate.on",
        tuple(benchmarked),
        f"models that are not served, because evals.{name} compares the likelihoods of its choices "
        f"and {served[0]!r} is served",
        "Remove the benchmark or the model",
      )
