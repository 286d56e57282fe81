"""Exports a trained student: as a Hugging Face folder, or as a GGUF file for llama.cpp.

Reads: the run in the workdir: its config and its last checkpoint, that of export.step, or the best
one (export.best). For a model card with results, also export.evaluation and export.deployment.

Writes: export.dir, a new folder, with README.md (the model card) and either config.json,
safetensors weights and the tokenizer, or a GGUF file, which contains all of these (export.format).
The numbers of the weights are those of export.quant, or those chosen for export.target_bytes. A
LoRA run is exported merged, as a PEFT adapter or as its base model (export.lora).

A student that was trained whole is copied from its checkpoint, slice by slice: no accelerator is
needed, and memory does not grow with it. Several processes write the weight files side by side. Run
the same command again after an interruption; finished weight files are kept. Linear weights that
were trained as integers (student.quantise) are rounded on the way. Students whose weights are
computed (adapters, shared layers) are made in the memory of `mesh` first. If weights are rounded to
numbers with which they were not trained, the loss by it is measured before, on text of `data`, and
the student is in the memory of `mesh` for it (export.calibration_tokens=0: not measured).

Config: mesh, data, export.

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
from distill_jax.deployment import draft, loss
from distill_jax.deployment.rounding import Width
from distill_jax.errors import bad_value
from distill_jax.hub import formats, packed_export
from distill_jax.hub.export import export_model
from distill_jax.hub.export_folder import check_new
from distill_jax.hub.formats import Format
from distill_jax.hub.locate import locate
from distill_jax.hub.options import ExportOptions
from distill_jax.hub.peft import export_adapters
from distill_jax.hub.weights import read_hf_json
from distill_jax.models import FamilyConfig, loading, runs, trainables
from distill_jax.models.options import ModelOptions
from distill_jax.models.runs import RUN, Run
from distill_jax.nn import params
from distill_jax.nn.grids import PACKED
from distill_jax.nn.quantise import UNROUNDED, QuantiseOptions
from distill_jax.report import deployment, model_card
from distill_jax.runtime import best_checkpoint, files, json_io, saved_arrays
from distill_jax.types import JsonObject, Model, PyTree

WEIGHTS = (".safetensors", ".gguf")
LORA_FORMS = ("merged", "peft", "base")
ONLY_OURS = (RUN, "package:")  # prefixes of sources that only this project can open


def run(config: Config, workdir: Path) -> JsonObject:
  """Writes the run in `workdir` into export.dir.

  Returns:
    export_dir, parameters and bytes, the size of the weight files; for shared layers also
    shared_parameters, the number of distinct parameters; if weights are rounded to a grid on which
    they were not trained, also the loss by it: see deployment/loss.py.

  Raises:
    InputError: The run or its checkpoint does not exist, the folder exists, or the config cannot be
      used.
  """
  options = config.export
  _check(options, adapters=trainables.of_student(config.student).has_base)
  form = formats.choose(options, config.student.quantise)
  evaluation = None
  if options.evaluation:
    action = "run evaluate first, or set export.evaluation to an empty string"
    evaluation = json_io.read_object(options.evaluation, action)
  deployed = deployment.read(options.deployment) if options.deployment else None
  check_new(options.dir)
  step = options.step or best_checkpoint.step_to_open(workdir, options.best)
  trained = loading.open_run(workdir, step)
  student = trained.student
  tokenizer = corpus.files_of(config.data, student.pretrained)
  rows = draft.rows(config, student, tokenizer) if options.draft else None
  summary: JsonObject = {"export_dir": options.dir}
  common: JsonObject = {
    "target": options.dir,
    "tokenizer": tokenizer,
    "card": model_card.card(config, step, evaluation, deployed),
  }
  if options.lora == "peft":
    model = _export_adapters(trained, config, common)
  else:
    common |= {"generation": student.generation, "extra": _task_files(config, student.config)}
    write, cost = _writer(config, form, trained, workdir, common)
    if rows is not None:
      write = draft.with_rows_of(rows, write)
    model = _export(trained, config, write)
    summary |= cost
  summary["parameters"] = params.count(model)
  weights = [i.size for n, i in files.listing(options.dir).items() if n.endswith(WEIGHTS)]
  summary["bytes"] = sum(weights)
  if config.student.share.layers:  # the folder has a copy of a shared layer for each use
    summary["shared_parameters"] = params.count(student.abstract_trainable)
  return summary


def _writer(
  config: Config, form: Format, trained: Run, workdir: Path, common: JsonObject
) -> tuple[Callable[..., None], JsonObject]:
  """Returns the function that writes the model, and the loss by rounding if that is measured.

  Args:
    config: the config.
    form: the format.
    trained: the run.
    workdir: its folder.
    common: the arguments that the functions of all formats have.

  Raises:
    InputError: the student cannot be written in this format.
  """
  if form.name == "gguf":
    return _gguf_writer(config, form, trained, workdir, common)
  options, grid = config.export, config.student.quantise
  integers = UNROUNDED
  if form.quant in PACKED:
    integers = QuantiseOptions(form.quant, form.group)
    packed_export.check(trained.student.abstract, integers)
  common |= {"dtype": options.dtype, "shard_bytes": options.shard_bytes}
  cost = _cost(config, form, trained)
  return functools.partial(export_model, quantise=grid, integers=integers, **common), cost


def _gguf_writer(
  config: Config, form: Format, trained: Run, workdir: Path, common: JsonObject
) -> tuple[Callable[..., None], JsonObject]:
  """Returns the same as `_writer`; only here the extra "gguf" is needed."""
  from distill_jax.deployment import mixed_precision
  from distill_jax.hub import gguf_export
  from distill_jax.hub.gguf_tensors import Numbers

  common |= {"extra": {}}  # the files of a task are for transformers
  student = trained.student
  numbers = Numbers(form.quant, form.embedding, trained=config.student.quantise)
  # What llama.cpp lacks is refused before anything is measured.
  gguf_export.gguf_files(student.abstract, common["tokenizer"], student.generation, numbers)
  if config.export.target_bytes:
    numbers, widths = mixed_precision.choose_widths(config, trained, workdir, numbers)
    common |= {"extra": {"widths.json": widths}}
    cost = {key: widths[key] for key in loss.KEYS}
  else:
    cost = _cost(config, form, trained)
  return functools.partial(gguf_export.export_gguf, numbers=numbers, **common), cost


def _cost(config: Config, form: Format, trained: Run) -> JsonObject:
  """Returns the loss by rounding if weights are not on the grid of training; {}: not measured."""
  if not form.rounds or not config.export.calibration_tokens:
    return {}
  width, table = Width(form.quant, form.group), Width(form.embedding)
  return loss.of_width(config, trained, width, table)


def _export(trained: Run, config: Config, write: Callable[..., None]) -> Model:
  """Writes a run, from its checkpoint where that has the model itself; returns it or its shapes."""
  if trained.student.trainable.is_model:
    model = trained.student.abstract_trainable
    with saved_arrays.open_arrays(trained.folder, trained.step) as saved:
      write(model, saved=saved)
    return model
  mesh = config.mesh.make()
  with jax.set_mesh(mesh):
    model = _load(trained, config.export, mesh)
    write(model)
  return model


def _export_adapters(trained: Run, config: Config, common: JsonObject) -> PyTree:
  """Writes the adapters of a run for PEFT; returns them."""
  mesh = config.mesh.make()
  trained.check_base()
  with jax.set_mesh(mesh):
    adapters = trained.restore(mesh)
    common |= {"config": trained.student.config, "dtype": config.export.dtype}
    base = _base(config.student, trained.student.config)
    export_adapters(adapters, config.student.lora, base=base, **common)
  return adapters


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


def _base(spec: ModelOptions, config: FamilyConfig) -> tuple[str, str] | None:
  """Returns (name, revision) of a base model that PEFT can load.

  Returns None if only a folder written with export.lora="base" can be the base.
  """
  is_changed = spec.keep_layers or spec.changes or spec.new
  is_read_here_only = spec.source.startswith(ONLY_OURS) or spec.source.endswith(".gguf")
  if not spec.source or is_changed or is_read_here_only:
    return None
  hf = read_hf_json(files.join(locate(spec.source), "config.json"))
  if ("text_config" in hf) != ("text_config" in config.to_hf()):
    return None  # Gemma 3 that also reads images: transformers opens it with other module names
  if not spec.source.startswith("hub:"):
    return spec.source, ""
  name, _, revision = spec.source.removeprefix("hub:").partition("@")
  return name, revision
