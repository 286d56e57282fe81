"""The search for a student's shape: several near one size, each distilled a little.

Every candidate has a folder: its model before training in `model`, what it is in MADE, its run in
`run`, and what it came to in SCORE.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
from pathlib import Path

import jax

from distill_jax.config import Config
from distill_jax.efficiency.measure import BenchmarkedModel
from distill_jax.errors import InputError
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
from distill_jax.runtime import distributed, json_io
from distill_jax.runtime.workdir import Workdir
from distill_jax.training import loop
from distill_jax.types import JsonObject

TARGETS = ("target_params", "target_bytes", "target_decode_rate")
MADE, SCORE, RATE = "made.json", "score.json", "decode_rate.json"


def propose(
  config: Config, teacher: ModelSource, workdir: Path, key: str
) -> dict[str, ShrinkOptions]:
  """Returns the shapes to try, by name, for the target that the key of `shrink` sets.

  Args:
    config: of the search.
    teacher: config.teacher, opened.
    workdir: where what is measured of the teacher is kept.
    key: the target, one of TARGETS.

  Raises:
    InputError: a target that no shape meets.
  """
  options, size = config.shrink, getattr(config.shrink, key)
  if not 0 < size < math.inf:
    raise InputError(f"shrink.{key} is {size}; it is a positive number")
  shapes.check(options, teacher.family, teacher.decoder_config)
  mesh = sharding.make_mesh(**vars(config.mesh))

  def check(student: DecoderConfig) -> None:
    """Refuses a Config that does not divide over the mesh."""
    abstract = shapes.abstract(teacher.family, student)
    sharding.shardings(abstract, mesh, teacher.compute.rules)

  target = _target(config, teacher, workdir, key)
  return candidates.propose(options, teacher.family, teacher.decoder_config, target, check)


def _target(config: Config, source: ModelSource, workdir: Path, key: str) -> Target:
  """The target in a unit that a shape alone determines.

  Decoding one text reads every weight that a token needs, and takes as long as that: the
  teacher's rate is measured once, and a shape's is that times how many fewer it has.
  """
  value = getattr(config.shrink, key)

  def parameters(student: DecoderConfig) -> float:
    return shapes.cost(source.family, student).parameters

  def active(student: DecoderConfig) -> float:
    return shapes.cost(source.family, student).active

  if key == "target_params":
    return Target(parameters, value, key)
  if key == "target_bytes":
    itemsize = float_dtype(config.shrink.dtype).itemsize
    return Target(lambda student: parameters(student) * itemsize, value, key)
  rate = _teacher_rate(config, source, workdir)
  if value <= rate:
    raise InputError(
      f"shrink.{key} is {value:g} and the teacher itself decodes {rate:.3g} a second here; "
      "name more"
    )
  unit = f"{key} at {rate:.3g} tokens a second of the teacher, in parameters a token,"
  return Target(active, active(source.decoder_config) * rate / value, unit)


def make(
  config: Config,
  source: ModelSource,
  proposed: dict[str, ShrinkOptions],
  folders: dict[str, Path],
) -> None:
  """Makes the candidates that are not made yet, of one teacher that is measured once."""
  todo = [name for name in proposed if not (folders[name] / MADE).exists()]
  if not todo:
    return
  teacher = MeasuredTeacher(config, source)
  for name in todo:
    folder = folders[name]
    # Without MADE, the making of what is there was interrupted.
    distributed.run_on_process_0(
      functools.partial(shutil.rmtree, folder / "model", ignore_errors=True)
    )
    summary = teacher.make(proposed[name], folder / "model", random=False)
    json_io.write_json_once(folder / MADE, summary)


def distil(config: Config, folder: Path) -> None:
  """Trains one candidate for shrink.steps steps; continues from its last checkpoint."""
  run = _distil_config(config, folder)
  with Workdir(folder / "run", run) as workdir:
    loop.train(run, workdir)


def _distil_config(config: Config, folder: Path) -> Config:
  """The config of a candidate's run: config's losses (kd, where it has none), shortened."""
  steps = config.shrink.steps
  return dataclasses.replace(
    config,
    student=dataclasses.replace(
      config.student,
      source=str(folder / "model"),
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
      checkpoint_every=min(config.train.checkpoint_every, steps),
      keep=1,
    ),
    losses=config.losses or {"soft": kd.Loss()},
    optim=dataclasses.replace(
      config.optim, warmup_steps=min(config.optim.warmup_steps, steps // 10)
    ),
  )


def score(config: Config, source: ModelSource, folders: dict[str, Path], rates: bool) -> None:
  """Measures trained candidates: held-out cross-entropy and, with `rates`, decoding speed."""
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
  """Loads a candidate as its run has left it."""
  spec = config.student.as_trained(f"{runs.RUN}{folder / 'run'}")
  with jax.set_mesh(mesh):
    source = loading.open_source(spec, config.seed)
    return source.load(mesh, runs.keys(config.seed)["student"])


def _teacher_rate(config: Config, source: ModelSource, workdir: Path) -> float:
  """Measured once: candidates do not change while the search continues."""
  if not (workdir / RATE).exists():
    mesh = sharding.make_mesh(**vars(config.mesh))
    with jax.set_mesh(mesh):
      teacher = source.load(mesh, runs.keys(config.seed)["teacher"])
    rate = _decode_rate(config, teacher, mesh)
    json_io.write_json_once(workdir / RATE, {"teacher": rate})
  return _read(workdir / RATE)["teacher"]


def _decode_rate(config: Config, loaded: LoadedModel, mesh: jax.sharding.Mesh) -> float:
  """Tokens a second of one text for each group of devices; `loaded` is taken apart."""
  options = config.shrink
  rows = math.prod(mesh.shape[axis] for axis in sharding.BATCH)
  with jax.set_mesh(mesh):
    unrolled = unroll(loaded.model, loaded.compute)
    model = BenchmarkedModel(
      loaded, unrolled, mesh, options.decode, options.context, rows, config.seed
    )
    model.run()  # compiles
    return model.run()["decode"] / rows


def _read(file: Path) -> JsonObject:
  return json_io.read_object(file, "delete its folder and run shrink again")


def summary(config: Config, folders: dict[str, Path], key: str) -> JsonObject:
  """Returns what the search came to; see commands/shrink.py."""
  rows, teacher = {}, {}
  for name, folder in folders.items():
    student_summary = _read(folder / MADE)
    student, teacher = student_summary["models"]["student"], student_summary["models"]["teacher"]
    rows[name] = {
      "kept": student_summary["kept"],
      "dir": student_summary["dir"],
      "run": str(folder / "run"),
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
