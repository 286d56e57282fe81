"""The programs that `train` and `record` would compile, lowered from shapes without allocation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from distill_jax.config import Config
from distill_jax.cross_tokenizer.dense import DenseTables
from distill_jax.errors import bad_value
from distill_jax.generation import placement
from distill_jax.models import loading, long_context
from distill_jax.models.loading import ModelSource
from distill_jax.models.options import ModelOptions
from distill_jax.nn import sharding
from distill_jax.on_policy.other_tokens import OtherTokens
from distill_jax.preflight import other_tokenizer
from distill_jax.records import (
  collate,
  fields,
  job,
  recording,
  student_corpus,
  student_rows,
  tap_features,
  tf_example,
)
from distill_jax.records.fields import Record
from distill_jax.records.manifest import with_rollout
from distill_jax.records.multi_teacher import MultiTeacherStore
from distill_jax.records.store import Manifest, Store
from distill_jax.records.teacher_pass import TeacherPass
from distill_jax.tasks import dataset
from distill_jax.training import aligned_store, loop, state, stores, validate
from distill_jax.training.aligned_store import AlignedStore
from distill_jax.training.outputs import OtherTokenizer
from distill_jax.types import Batch, JsonObject, Model, Recorded

ModelT = TypeVar("ModelT", bound=ModelOptions)


@dataclasses.dataclass(frozen=True)
class LoweredStep:
  """A program that is ready to compile, and its arguments.

  Attributes:
    lowered: the lowered function (jax.stages.Lowered).
    arguments: bytes per device by purpose, e.g. "parameters", "optimizer", "batch".
    rows: sequences per step, over all devices.
  """

  lowered: Any
  arguments: dict[str, int]
  rows: int


def without_weights(config: Config) -> Config:
  """Returns the config with the source removed from models that have a named shape."""

  def by_shape(spec: ModelT) -> ModelT:
    return dataclasses.replace(spec, source="") if spec.shape else spec

  teachers = dict.fromkeys(config.teachers, "") if config.teacher.shape else config.teachers
  return dataclasses.replace(
    config, teacher=by_shape(config.teacher), student=by_shape(config.student), teachers=teachers
  )


def lower(config: Config, verb: str, mesh: Mesh, other: OtherTokens | None = None) -> LoweredStep:
  """Returns the step of `train`, `record` or `on_policy`, lowered for this mesh.

  That of `on_policy` is the step of `train` on texts that the student wrote.

  Args:
    config: the config of the run.
    verb: the command.
    mesh: the device mesh.
    other: what the teacher in the step of `on_policy` needs if it has other tokens than the
      student; otherwise None.

  Raises:
    InputError: `verb` would raise it, e.g. for a batch or dimension that is not divisible, or for
      losses that the records do not support.
  """
  if verb == "record":
    return _record(config, mesh)
  if verb == "train":
    return _train(config, mesh, _planned_stores(config))
  scalars = fields.rollout_scalars(bool(config.on_policy.reward))
  rollout = {"round": 0, "student": "", "sampling": {}, "scalars": scalars}
  texts = _planned_store(config, rollout, other_tokenizer.positions(config))
  return _train(config, mesh, [texts if other is None else other.planned(texts)])


def planned_manifest(config: Config, vocab_size: int = 0, positions: int = 0) -> Manifest:
  """Returns the manifest that the records will have.

  Args:
    config: the config of the run.
    vocab_size: number of tokens or classes; 0: the vocabulary size of the model.
    positions: positions per sequence or example; 0: data.seq_len.
  """
  model = config.student if config.losses else config.teacher
  return recording.planned_manifest(
    config.records,
    vocab_size or loading.open_source(model).text_config.vocab_size,
    sequences=1,
    positions=positions or config.data.seq_len,
    feature_width=_feature_width(config),
    labels=bool(config.tasks),
  )


def _feature_width(config: Config) -> int:
  """Returns the size of the teacher's recorded features before projection; 0 without taps."""
  if not config.records.taps:
    return 0
  teacher = loading.open_source(config.teacher).config
  return tap_features.feature_width(teacher, config.records.tap_kind)


def _planned_store(config: Config, rollout: JsonObject, positions: int = 0) -> MultiTeacherStore:
  """Returns a store of text that is not recorded yet.

  Args:
    config: the config of the run.
    rollout: that of its manifest.
    positions: positions of a sequence; 0: data.seq_len.
  """
  planned = planned_manifest(config, positions=positions)
  store = Store(Path("preflight"), with_rollout(planned, rollout))
  return MultiTeacherStore(store, dict.fromkeys(config.train.teachers, store))


def _planned_stores(config: Config) -> stores.Stores:
  """Returns stores like those that `train` opens, without recorded files."""
  if not config.tasks:
    store = _planned_store(config, {})
    if not (config.train.online and config.retarget.tokenizer):
      return [store]
    aligned_store.check_options(config)
    models = (loading.open_source(spec, config.seed) for spec in (config.student, config.teacher))
    tables = aligned_store.make_tables(config, *models)
    return [AlignedStore(store, other_tokenizer.planned_rows(config, store, tables))]
  tasks = stores.open_tasks(config)
  ranges = dataset.class_ranges(tasks)
  recorded = []
  for name, examples in tasks.items():
    source = examples.source
    manifest = (
      planned_manifest(config, source.classes, source.positions)
      if config.train.records
      else examples.manifest
    )
    recorded.append(dataset.RecordedTask(examples, None, ranges[name], manifest))
  return recorded


def _train(config: Config, mesh: Mesh, opened: stores.Stores) -> LoweredStep:
  student = loading.open_source(config.student, config.seed)
  c = config.train
  # The tokenizer and the stores can be missing, so their files are not checked.
  without_files = dataclasses.replace(
    config,
    data=dataclasses.replace(config.data, tokenizer=""),
    train=dataclasses.replace(c, records=c.records if config.tasks else ("records",)),
  )
  validate.check_run(without_files, opened, student)
  online = state.online_teachers(config)
  validate.check_mesh(without_files, opened, [student, *online.values()], mesh)
  step = loop.make_step(config, opened, student, online)
  validate.check_features(config, step, opened)
  abstract = state.abstract_state(step, opened, student)
  shardings = sharding.shardings(abstract, mesh, step.student.rules)
  trained = sharding.with_shardings(abstract, shardings)
  manifest = opened[0].manifest
  row, reader = placeholder_text(manifest), stores.reader(config, opened)
  teachers: dict[str, Any] = {name: _model(source, mesh) for name, source in online.items()}
  if config.tasks:
    row = opened[0][0]
  elif isinstance(opened[0], AlignedStore):
    rows = opened[0].rows
    row = student_rows.placeholder(rows.positions, rows.teacher_positions)
    tables = other_tokenizer.table_shapes(rows.dense_tables, mesh)
    teachers[student_rows.TEACHER] = OtherTokenizer(
      teachers[student_rows.TEACHER], tables, config.retarget.min_mass
    )
  recorded = [*(() if c.online else ("teacher",)), *c.teachers]
  batch = planned_batch(manifest, row, recorded, reader, c.batch_size, mesh)
  base = _model(student, mesh) if step.trainable.has_base else None
  with jax.set_mesh(mesh):
    lowered = loop.jitted(step, trained, mesh).lower(trained, batch, teachers, base=base)
  arguments = {
    "parameters": placement.bytes_per_device(trained.params),
    "optimizer": placement.bytes_per_device((trained.opt, trained.adapters, trained.balance)),
    "frozen base": placement.bytes_per_device(base),
    "teacher": placement.bytes_per_device(teachers),
    "batch": placement.bytes_per_device(batch),
  }
  return LoweredStep(lowered, {k: n for k, n in arguments.items() if n}, c.batch_size)


def _record(config: Config, mesh: Mesh) -> LoweredStep:
  c = config.records
  if not job.runs_teacher(c):
    name = "served" if c.served else "logprobs" if c.logprobs else "kind"
    expected = "a config that runs a teacher here, because otherwise nothing is compiled"
    action = "Run preflight with another config"
    raise bad_value(f"records.{name}", getattr(c, name), expected, action)
  student_corpus.check(config)
  sharding.check_batch("records.batch_size", c.batch_size, mesh)
  teacher = loading.open_source(config.teacher, config.seed)
  positions = long_context.positions(config.data)
  long_context.check(mesh, positions, [teacher], of_tasks=bool(config.tasks))
  projected: tuple[DenseTables, ...] = ()
  if config.tasks:
    corpus = dataset.open_corpus(config, teacher.pretrained, teacher.config)
    manifest = planned_manifest(config, corpus.classes, corpus.positions)
    name = dataset.recorded_task(config)
    reader = dataset.reader({name: config.tasks[name]})
    row, first_class = corpus.rows[0], corpus.first_class
  elif c.student_tokenizer:
    tables = student_corpus.make_tables(config, teacher)
    rows = other_tokenizer.planned_rows(config, _planned_store(config, {}), tables)
    projected = (other_tokenizer.table_shapes(rows.dense_tables, mesh),)
    manifest = planned_manifest(config, tables.student.size, rows.positions)
    reader, first_class = student_rows.read, 0
    row = student_rows.placeholder(rows.positions, rows.teacher_positions)
  else:
    manifest = planned_manifest(config, teacher.text_config.vocab_size)
    reader, row, first_class = None, placeholder_text(manifest), 0
  model = _model(teacher, mesh)
  batch = planned_batch(manifest, row, [], reader, c.batch_size, mesh)
  by_rows, replicated = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  key = sharding.with_shardings(jax.eval_shape(jax.random.key, 0), replicated)
  index_B = jax.ShapeDtypeStruct((c.batch_size,), jnp.int32, sharding=by_rows)
  width, min_mass = _feature_width(config), config.retarget.min_mass
  run = TeacherPass(c, teacher.compute, manifest.vocab_size, first_class, width, min_mass)
  with jax.set_mesh(mesh):
    jitted = run.jitted_projection if projected else run.jitted
    lowered = jitted.lower(model, key, batch, index_B, *projected)
  arguments = {
    "teacher": placement.bytes_per_device((model, projected)),
    "batch": placement.bytes_per_device(batch),
  }
  return LoweredStep(lowered, arguments, c.batch_size)


def _model(source: ModelSource, mesh: Mesh) -> Model:
  """Returns the shapes of a model, with shardings."""
  shardings = sharding.shardings(source.abstract, mesh, source.compute.rules)
  return sharding.with_shardings(source.abstract, shardings)


def placeholder_text(manifest: Manifest) -> Record:
  """Returns a placeholder for a row of text."""
  T = manifest.seq_len
  return {
    "tokens_T": np.zeros(T, np.int32),
    "segments_T": np.ones(T, np.int32),
    "mask_T": np.ones(T, bool),
  }


def planned_batch(
  manifest: Manifest,
  row: Record,
  teachers: Sequence[str],
  reader: collate.Read | None,
  rows: int,
  mesh: Mesh,
) -> Batch:
  """Returns the shapes of a batch from the loader, with shardings.

  A placeholder record is encoded and decoded, so that the batch has the loader's format.

  Args:
    manifest: the manifest of the store.
    row: a record without what the store adds (targets and rollout scalars), for all rows.
    teachers: names of the teachers whose targets are recorded.
    reader: see collate.
    rows: number of rows.
    mesh: the device mesh.
  """
  layers, width = (len(manifest.taps.layers), manifest.taps.width) if manifest.taps else (0, 0)
  targets = fields.placeholder(manifest.spec, manifest.seq_len, layers, width)
  row |= {field.record: targets[field.record] for field in manifest.spec.rollout_scalars}
  record = tf_example.decode(0, tf_example.encode(0, row | targets, manifest), manifest)
  for name in teachers:
    prefix = "" if name == "teacher" else f"{name}/"
    row |= {prefix + field: x for field, x in record.items() if field not in fields.WITHOUT_TARGETS}
  recorded = Recorded(temperature=manifest.temperature, missing_mass=manifest.missing_mass)
  batch = collate.collate([row], "teacher" in teachers, reader, recorded)

  def of_all_rows(x: np.ndarray, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=sharding)

  return jax.tree.map(of_all_rows, batch, collate.shardings(batch, mesh))
