"""The search for a student's sizes: several candidates near a target, each distilled briefly.

Every candidate has a folder with its model before training (`model`), a summary of it (MADE), its
training run (`run`), and its scores (SCORE).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import jax

from distill_jax.config import Config
from distill_jax.efficiency.measure import BenchmarkedModel
from distill_jax.errors import bad_value
from distill_jax.generation.unrolled import unroll
from distill_jax.hub.weights import float_dtype
from distill_jax.losses import kd
from distill_jax.models import DecoderConfig, loading, runs
from distill_jax.models.loading import LoadedModel, ModelSource
from distill_jax.nn import sharding
from distill_jax.nn.layer_sharing import ShareOptions
from distill_jax.nn.lora import LoraOptions
from distill_jax.pruning import candidates, shapes
from distill_jax.pruning.candidates import Target
from distill_jax.pruning.measured_teacher import MeasuredTeacher
from distill_jax.pruning.options import ShrinkOptions
from distill_jax.runtime import distributed, files, json_io, storage
from distill_jax.runtime.workdir import Workdir
from distill_jax.training import loop
from distill_jax.types import JsonObject

TARGETS = ("target_params", "target_bytes", "target_decode_rate")
MADE, SCORE, RATE = "made.json", "score.json", "decode_rate.json"


def propose(
  config: Config, teacher: ModelSource, workdir: Path, key: str
) -> dict[str, ShrinkOptions]:
  """Returns the candidates for a target, by name.

  Args:
    config: the config of the search.
    teacher: the opened config.teacher.
    workdir: the folder for measurements of the teacher.
    key: the key of the target in `shrink`, one of TARGETS.

  Raises:
    InputError: a student cannot meet the target.
  """
  options, size = config.shrink, getattr(config.shrink, key)
  if not 0 < size < math.inf:
    raise bad_value(f"shrink.{key}", size, "a positive number", "Change the target")
  shapes.check(options, teacher.family, teacher.decoder_config)
  mesh = config.mesh.whole_rows().make()

  def check(student: DecoderConfig) -> None:
    """Raises InputError if a Config is not divisible by the mesh axes."""
    abstract = shapes.abstract(teacher.family, student)
    sharding.shardings(abstract, mesh, teacher.compute.rules)

  target = _target(config, teacher, workdir, key)
  return candidates.propose(options, teacher.family, teacher.decoder_config, target, check)


def _target(config: Config, source: ModelSource, workdir: Path, key: str) -> Target:
  """Returns the target in a unit that can be computed from a Config.

  When one text is decoded, reading the weights that a token uses takes nearly all of the time. So
  the teacher's rate is measured once, and a candidate's rate is estimated as inversely proportional
  to its number of parameters per token.
  """
  value = getattr(config.shrink, key)

  def parameters(student: DecoderConfig) -> float:
    return shapes.cost(source.family, student).parameters

  def active(student: DecoderConfig) -> float:
    return shapes.cost(source.family, student).active

  if key == "target_params":
    return Target(parameters, value, "parameters", key, value)
  if key == "target_bytes":
    itemsize = float_dtype(config.shrink.dtype).itemsize
    return Target(lambda student: parameters(student) * itemsize, value, "bytes", key, value)
  rate = _teacher_rate(config, source, workdir)
  if value <= rate:
    expected = f"more than {rate:.3g} tokens per second, the teacher's speed on this machine"
    raise bad_value(f"shrink.{key}", value, expected, "Raise the target")
  unit = f"parameters per token (the teacher decodes {rate:.3g} tokens per second)"
  return Target(active, active(source.decoder_config) * rate / value, unit, key, value)


def make(
  config: Config,
  source: ModelSource,
  proposed: dict[str, ShrinkOptions],
  folders: dict[str, Path],
) -> None:
  """Cuts the candidates that do not exist yet. The teacher is measured once."""
  todo = [name for name in proposed if not (folders[name] / MADE).exists()]
  if not todo:
    return
  teacher = MeasuredTeacher(config, source)
  for name in todo:
    folder = folders[name]
    model = storage.location(folder / "model")
    # Without MADE, a previous attempt was interrupted.
    distributed.run_on_process_0(functools.partial(files.remove_tree, model))
    summary = teacher.make(proposed[name], model, random=False)
    json_io.write_json_once(folder / MADE, summary)


def distil(config: Config, folder: Path) -> None:
  """Trains one candidate for shrink.steps steps; resumes from its last checkpoint."""
  run = _distil_config(config, folder)
  with Workdir(folder / "run", run) as workdir:
    loop.train(run, workdir)


def _distil_config(config: Config, folder: Path) -> Config:
  """Returns the config of a candidate's run: shorter, with kd if the config has no losses."""
  steps = config.shrink.steps
  return dataclasses.replace(
    config,
    student=dataclasses.replace(
      config.student,
      source=storage.location(folder / "model"),
      shape="",
      digest="",
      keep_layers=(),
      train="frozen" if config.student.frozen else config.student.as_trained("").train,
      lora=LoraOptions(),
      share=ShareOptions(),
    ),
    train=dataclasses.replace(
      config.train,
      steps=steps,
      keep=1,
    ),
    losses=config.losses or {"soft": kd.Loss()},
    optim=dataclasses.replace(
      config.optim, warmup_steps=min(config.optim.warmup_steps, steps // 10)
    ),
  )


def score(config: Config, source: ModelSource, folders: dict[str, Path], rates: bool) -> None:
  """Measures the held-out cross-entropy of candidates, and with `rates` their decoding speed."""
  todo = [folder for folder in folders.values() if not (folder / SCORE).exists()]
  if not todo:
    return
  teacher = MeasuredTeacher(config, source)
  for folder in todo:
    student = trained(config, teacher.mesh, folder)
    scores = {"ce": teacher.cross_entropy(student.decoder)}
    if rates:
      scores["decode_rate"] = _decode_rate(config, student, teacher.mesh)
    json_io.write_json_once(folder / SCORE, scores)


def trained(config: Config, mesh: jax.sharding.Mesh, folder: Path) -> LoadedModel:
  """Returns a candidate after training."""
  spec = config.student.as_trained(f"{runs.RUN}{storage.location(folder / 'run')}")
  with jax.set_mesh(mesh):
    source = loading.open_source(spec, config.seed)
    return source.load(mesh, runs.keys(config.seed)["student"])


def _teacher_rate(config: Config, source: ModelSource, workdir: Path) -> float:
  """Returns the teacher's tokens per second, measured once, so that resuming does not change it."""
  if not (workdir / RATE).exists():
    mesh = config.mesh.whole_rows().make()
    with jax.set_mesh(mesh):
      teacher = source.load(mesh, runs.keys(config.seed)["teacher"])
    rate = _decode_rate(config, teacher, mesh)
    json_io.write_json_once(workdir / RATE, {"teacher": rate})
  return _read(workdir / RATE)["teacher"]


def _decode_rate(config: Config, loaded: LoadedModel, mesh: jax.sharding.Mesh) -> float:
  """Returns the tokens per second of one text for each group of devices; consumes `loaded`."""
  options = config.shrink
  rows = sharding.row_shards(mesh)
  with jax.set_mesh(mesh):
    unrolled = unroll(loaded.model, loaded.compute)
    model = BenchmarkedModel(
      loaded, unrolled, mesh, options.decode, options.context, rows, config.seed
    )
    model.run()  # compiles the programs
    return model.run()["decode"] / rows


def _read(file: Path) -> JsonObject:
  return json_io.read_object(file, "delete its folder and run shrink again")


def summary(config: Config, folders: dict[str, Path], key: str) -> JsonObject:
  """Returns the results of the search; see commands/shrink.py."""
  rows, teacher = {}, {}
  for name, folder in folders.items():
    student_summary = _read(folder / MADE)
    student, teacher = student_summary["models"]["student"], student_summary["models"]["teacher"]
    rows[name] = {
      "kept": student_summary["kept"],
      "dir": student_summary["dir"],
      "run": storage.location(folder / "run"),
      "parameters": student["parameters"],
      "bytes": student["bytes"],
      "ce_before": student["ce"],
      **_read(folder / SCORE),
    }
  return {
    "target": f"shrink.{key}",
    "wanted": getattr(config.shrink, key),
    "steps": config.shrink.steps,
    "teacher": teacher,
    "candidates": rows,
    "recommended": min(rows, key=lambda name: rows[name]["ce"]),
  }
