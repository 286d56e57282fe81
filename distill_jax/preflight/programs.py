"""The programs that `train` and `record` would compile, from shapes: nothing is allocated."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distill_jax.config import Config
from distill_jax.errors import InputError
from distill_jax.models import loading
from distill_jax.models.options import ModelOptions
from distill_jax.nn import sharding
from distill_jax.records import collate, fields, multi_teacher, recorder, taps, tf_example
from distill_jax.records.store import Manifest, Store
from distill_jax.tasks import dataset
from distill_jax.training import loop, state, stores, validate
from distill_jax.types import Recorded


@dataclasses.dataclass(frozen=True)
class Program:
  """What is compiled, and what it is given.

  Attributes:
    lowered: jax's, ready to compile.
    arguments: bytes a device by what they are, as "parameters", "optimizer", "batch".
    rows: sequences a step, over all devices.
  """

  lowered: Any
  arguments: dict[str, int]
  rows: int


def without_weights(config: Config) -> Config:
  """The config with models by their named shapes, where they name one beside a source."""

  def named(spec: Any) -> Any:
    return dataclasses.replace(spec, source="") if spec.shape else spec

  teachers = dict.fromkeys(config.teachers, "") if config.teacher.shape else config.teachers
  return dataclasses.replace(
    config, teacher=named(config.teacher), student=named(config.student), teachers=teachers
  )


def of(config: Config, verb: str, mesh: Mesh) -> Program:
  """The step of `train`, or the pass of `record`, as it is compiled on this mesh.

  Raises:
    InputError: what `verb` would refuse: a batch or dimension that does not divide, losses
      that the records do not serve.
  """
  return {"train": _train, "record": _record}[verb](config, mesh)


def manifest(config: Config, classes: int = 0, positions: int = 0) -> Manifest:
  """What the records' manifest would say, of a task with so many classes and positions or of text.

  The tokenizer of text has all rows of the model that reads.
  """
  model = config.student if config.losses else config.teacher
  classes = classes or loading.family_and_config(model)[1].vocab_size
  T = positions or config.data.seq_len
  width = _feature_width(config)
  return recorder.planned_manifest(config.records, classes, 1, T, width, bool(config.tasks))


def _feature_width(config: Config) -> int:
  """Numbers in a vector that the records hold of the teacher's features, before a projection."""
  if not config.records.taps:
    return 0
  teacher = loading.family_and_config(config.teacher)[1]
  return taps.feature_width(teacher, config.records.tap_kind)


def _stores(config: Config) -> stores.Stores:
  """As train opens them, as if all had been recorded."""
  if not config.tasks:
    store = Store(Path("preflight"), manifest(config))
    return [multi_teacher.MultiTeacherStore(store, dict.fromkeys(config.train.teachers, store))]
  rows = stores.open_tasks(config)
  if not config.train.records:
    config = dataclasses.replace(config, records=dataclasses.replace(config.records, kind="text"))
  ranges = dataset.class_ranges(rows)
  planned = []
  for name, examples in rows.items():
    about = manifest(config, examples.source.classes, examples.source.positions)
    planned.append(dataset.RecordedTask(examples, None, ranges[name], about))
  return planned


def _train(config: Config, mesh: Mesh) -> Program:
  opened, student = _stores(config), loading.open_source(config.student, config.seed)
  alone = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=""))
  given = config.train.records if config.tasks else ("records",)
  alone = dataclasses.replace(alone, train=dataclasses.replace(alone.train, records=given))
  validate.check_run(alone, opened, student)
  c = config.train
  sharding.check_batch("train.batch_size", c.batch_size, mesh, config.optim.accumulate)
  step = loop.make_step(config, opened, student)
  validate.check_features(config, step, opened)
  abstract = state.abstract_state(step, opened, student)
  shardings = sharding.shardings(abstract, mesh, step.student.rules)
  trained = sharding.with_shardings(abstract, shardings)
  about = opened[0].manifest
  recorded = [*(() if c.online else ("teacher",)), *c.teachers]
  one = opened[0][0] if config.tasks else _text(about)
  batch = _batch(config, about, c.batch_size, mesh, recorded, one)
  teachers = {name: _model(spec, mesh) for name, spec in state.online_teachers(config).items()}
  base = _model(config.student, mesh) if step.trainable.has_base else None
  with jax.set_mesh(mesh):
    lowered = loop.jitted(step, trained, mesh).lower(trained, batch, teachers, base=base)
  arguments = {
    "parameters": bytes_of(trained.params),
    "optimizer": bytes_of((trained.opt, trained.adapters, trained.balance)),
    "frozen base": bytes_of(base),
    "teacher": bytes_of(teachers),
    "batch": bytes_of(batch),
  }
  return Program(lowered, {k: n for k, n in arguments.items() if n}, c.batch_size)


def _record(config: Config, mesh: Mesh) -> Program:
  if config.records.kind == "text" or config.records.logprobs:
    raise InputError(
      f"records.kind is {config.records.kind!r} and records.logprobs {config.records.logprobs!r}: "
      "no teacher runs there, so there is nothing to compile; preflight another config"
    )
  rows = config.records.batch_size
  sharding.check_batch("records.batch_size", rows, mesh)
  if config.tasks:
    teacher = loading.family_and_config(config.teacher)[1]
    task = dataset.open_corpus(config, loading.pretrained(config.teacher), teacher)
    name = dataset.recorded_task(config)
    config = dataclasses.replace(config, tasks={name: config.tasks[name]})
    about = manifest(config, task.classes, task.positions)
    first, one = task.first_class, task.rows[0]
  else:
    about = manifest(dataclasses.replace(config, losses={}))
    first, one = 0, _text(about)
  model, compute = _model(config.teacher, mesh), loading.compute_config(config.teacher)
  batch = _batch(config, about, rows, mesh, [], one)
  whole = sharding.replicated(mesh)
  key = loading.place(jax.eval_shape(jax.random.key, 0), whole)
  index_B = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=sharding.batch_sharding(mesh))
  with jax.set_mesh(mesh):
    width = _feature_width(config)
    run = recorder.Recorder(config.records, compute, about.vocab_size, first, width)
    lowered = run.jitted.lower(model, key, batch, index_B)
  return Program(lowered, {"teacher": bytes_of(model), "batch": bytes_of(batch)}, rows)


def _model(spec: ModelOptions, mesh: Mesh) -> Any:
  like = loading.abstract(spec)
  return loading.place(like, sharding.shardings(like, mesh, loading.compute_config(spec).rules))


def _text(about: Manifest) -> dict[str, np.ndarray]:
  """A row of made-up text."""
  T = about.seq_len
  return {
    "tokens_T": np.zeros(T, np.int32),
    "segments_T": np.ones(T, np.int32),
    "mask_T": np.ones(T, bool),
  }


def _batch(
  config: Config, about: Manifest, rows: int, mesh: Mesh, recorded: list[str], one: Any
) -> Any:
  """Batches as the loader makes them, of rows like `one` and with targets of these teachers.

  One record, made up, is encoded and read back.
  """
  row = tf_example.decode(0, tf_example.encode(0, one | _targets(about), about), about)
  for name in recorded:
    at = "" if name == "teacher" else f"{name}/"
    one |= {at + field: x for field, x in row.items() if field not in fields.UNTAUGHT}
  recording = Recorded(temperature=about.temperature, missing_mass=about.missing_mass)
  batch = collate.collate([one], "teacher" in recorded, dataset.reader(config.tasks), recording)
  where = sharding.batch_sharding(mesh)

  def of_all_rows(x: np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=where)

  return jax.tree.map(of_all_rows, batch)


def _targets(about: Manifest) -> dict[str, np.ndarray]:
  """Made-up targets of one sequence, as a recorder would write them."""
  layers, width = (len(about.taps.layers), about.taps.width) if about.taps else (0, 0)
  return fields.placeholder(about.spec, about.seq_len, layers, width)


def bytes_of(tree: Any) -> int:
  """Bytes a device holds of a tree of placed shapes."""
  of = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
  return sum(map(of, jax.tree.leaves(tree)))
