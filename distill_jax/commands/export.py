"""Exports a trained student as a Hugging Face folder that `transformers` loads.

Reads: the run in the workdir: its config and its last checkpoint, that of export.step, or the best
one (export.best). For a model card with results, also export.evaluation and export.deployment.

Writes: export.dir, a new folder: config.json, safetensors weights, the tokenizer and README.md (the
model card). A LoRA run is exported merged, as a PEFT adapter or as its base model (export.lora).

A student that was trained whole is copied from its checkpoint, slice by slice: no accelerator is
needed, and memory does not grow with it. Several processes write the weight files side by side. Run
the same command again after an interruption; finished weight files are kept. Linear weights that
were trained as integers (student.quantise) are rounded on the way. Students whose weights are
computed (adapters, shared layers) are made in the memory of `mesh` first.

Config: mesh, export.

Example:
  distill-jax export --config=configs/demo.py:distilled --workdir=runs/demo/distilled
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import jax

from distill_jax.config import Config
from distill_jax.data import corpus
from distill_jax.errors import bad_value
from distill_jax.hub.export import export_model
from distill_jax.hub.export_folder import check_new
from distill_jax.hub.options import ExportOptions
from distill_jax.hub.peft import export_adapters
from distill_jax.models import FamilyConfig, loading, runs, trainables
from distill_jax.models.options import ModelOptions
from distill_jax.models.runs import RUN, Run
from distill_jax.nn import params, sharding
from distill_jax.report import deployment, model_card
from distill_jax.runtime import best_checkpoint, json_io, saved_arrays
from distill_jax.types import JsonObject, Model

LORA_FORMS = ("merged", "peft", "base")
ONLY_OURS = (RUN, "package:")  # prefixes of sources that only this project can open


def run(config: Config, workdir: Path) -> JsonObject:
  """Writes the run in `workdir` as a Hugging Face folder into export.dir.

  Returns:
    export_dir, parameters and bytes, the size of the weight files; for shared layers also
    shared_parameters, the number of distinct parameters.

  Raises:
    InputError: The run or its checkpoint does not exist, or the folder exists.
  """
  options, lora = config.export, config.student.lora
  _check(options, adapters=trainables.of_student(config.student).has_base)
  evaluation = None
  if options.evaluation:
    action = "run evaluate first, or set export.evaluation to an empty string"
    evaluation = json_io.read_object(options.evaluation, action)
  deployed = deployment.read(options.deployment) if options.deployment else None
  check_new(options.dir)
  step = options.step or best_checkpoint.step_to_open(workdir, options.best)
  card = model_card.card(config, step, evaluation, deployed)
  trained = loading.open_run(workdir, step)
  student = trained.student
  tokenizer = corpus.files_of(config.data, student.pretrained)
  summary: JsonObject = {"export_dir": options.dir}
  if options.lora == "peft":
    mesh = sharding.make_mesh(**vars(config.mesh))
    trained.check_base()
    with jax.set_mesh(mesh):
      model = trained.restore(mesh)
      base = _base(config.student)
      export_adapters(
        model, lora, options.dir, base=base, tokenizer=tokenizer, card=card, dtype=options.dtype
      )
  else:
    write = functools.partial(
      export_model,
      target=options.dir,
      tokenizer=tokenizer,
      generation=student.generation,
      card=card,
      dtype=options.dtype,
      shard_bytes=options.shard_bytes,
      extra=_task_files(config, student.config),
      quantise=trained.config.student.quantise,
    )
    model, summary["bytes"] = _export(trained, config, write)
  summary["parameters"] = params.count(model)
  if config.student.share.layers:  # the folder has a copy of a shared layer for each use
    summary["shared_parameters"] = params.count(student.abstract_trainable)
  return summary


def _export(trained: Run, config: Config, write: Callable[..., int]) -> tuple[Model, int]:
  """Writes a run, from its checkpoint where that has the model itself.

  Returns:
    (the model or its shapes, the size of the weight files).
  """
  if trained.student.trainable.is_model:
    model = trained.student.abstract_trainable
    with saved_arrays.open_arrays(trained.folder, trained.step) as saved:
      return model, write(model, saved=saved)
  mesh = sharding.make_mesh(**vars(config.mesh))
  with jax.set_mesh(mesh):
    model = _load(trained, config.export, mesh)
    return model, write(model)


def _check(options: ExportOptions, adapters: bool) -> None:
  if options.best and options.step:
    raise bad_value("export.step", options.step, "0 with export.best", "Remove one of the keys")
  if not options.dir:
    raise bad_value("export.dir", "", "the path of a new folder", "Set it")
  if options.lora not in LORA_FORMS:
    expected = ", ".join(map(repr, LORA_FORMS[:-1])) + f" or {LORA_FORMS[-1]!r}"
    raise bad_value("export.lora", options.lora, expected, "Choose one of them")
  if options.lora != "merged" and not adapters:
    raise bad_value(
      "export.lora",
      options.lora,
      "'merged', because this run has not trained LoRA adapters",
      "Remove the key",
    )


def _load(trained: Run, options: ExportOptions, mesh: jax.sharding.Mesh) -> Model:
  """Returns the trained model or, for export.lora="base", the base model of its adapters."""
  student = trained.student
  if options.lora != "base":
    return trained.load(mesh, student.compute)
  trained.check_base()
  return student.load(mesh, runs.keys(trained.config.seed)["student"]).model


def _task_files(config: Config, model_config: FamilyConfig) -> JsonObject:
  """Returns the JSON files that describe the task, by name; {} for several tasks.

  With several tasks, each has a part of the head, which these files cannot describe.
  """
  if len(config.tasks) != 1:
    return {}
  (task,) = config.tasks.values()
  return task.hub_files(model_config)


def _base(spec: ModelOptions) -> tuple[str, str] | None:
  """Returns (name, revision) of a base model that PEFT can load.

  Returns None if only a folder written with export.lora="base" can be the base.
  """
  if not spec.source or spec.keep_layers or spec.source.startswith(ONLY_OURS):
    return None
  if not spec.source.startswith("hub:"):
    return None if spec.source.endswith(".gguf") else (spec.source, "")
  name, _, revision = spec.source.removeprefix("hub:").partition("@")
  return name, revision
