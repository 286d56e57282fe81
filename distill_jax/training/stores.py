"""The training data of a run: stores of records, tasks, and their batches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from distill_jax.config import Config
from distill_jax.errors import InputError, bad_value
from distill_jax.models import loading
from distill_jax.models.loading import ModelSource
from distill_jax.nn import sharding
from distill_jax.records import collate, student_rows
from distill_jax.records.manifest import Manifest
from distill_jax.records.multi_teacher import MultiTeacherStore
from distill_jax.records.store import open_store
from distill_jax.tasks import dataset, model_checks
from distill_jax.tasks.dataset import RecordedTask, TaskExamples
from distill_jax.training import aligned_store, loader, span_store
from distill_jax.training.aligned_store import AlignedStore
from distill_jax.training.span_store import SpanStore
from distill_jax.types import Batch, Recorded

OneStore = MultiTeacherStore | RecordedTask | AlignedStore | SpanStore
Stores = Sequence[OneStore]


def open_stores(config: Config, student: ModelSource | None = None) -> Stores:
  """Opens and checks the stores of a config, with the records of all teachers joined.

  Tasks have their own data and only need records for a teacher's outputs. Text in the tokens of a
  teacher with another tokenizer is read in the student's tokens: for the teacher in the step, or,
  of records, with its probabilities of spans.

  Args:
    config: The config of the run.
    student: The model to train, for its tokenizer; None to open config.student.

  Raises:
    InputError: A store is missing, or does not fit the others or its task.
  """
  c = config.train
  return _open(config, student, "train", "train.records", c.records, "train.teachers", c.teachers)


def open_heldout(config: Config, student: ModelSource | None = None, stores: Stores = ()) -> Stores:
  """Opens the held-out stores of a config as `open_stores` does; () if nothing is evaluated.

  Tasks that are trained without records are evaluated on their own held-out examples.

  Args:
    config: The config of the run.
    student: See `open_stores`.
    stores: The stores it trains on. Held-out text in the teacher's tokens gets their lengths.
  """
  c = config.train
  if not c.heldout and not (config.tasks and c.eval_every):
    return ()
  keys = "train.heldout", "train.heldout_teachers"
  return _open(config, student, "heldout", keys[0], c.heldout, keys[1], c.heldout_teachers, stores)


def _open(
  config: Config,
  student: ModelSource | None,
  split: str,
  key: str,
  paths: Sequence[str],
  teachers_key: str,
  teachers: Mapping[str, Sequence[str]],
  trained: Stores = (),
) -> Stores:
  """Opens the stores of a split, whose folders and those of further teachers two keys name."""
  if not config.tasks:
    stores = _open_records(key, paths, teachers_key, teachers)
    student = student or loading.open_source(config.student, config.seed)
    align = aligned_store.align if config.train.online else span_store.align
    return align(config, student, key, stores, trained)
  records = _open_records(key, paths, teachers_key, teachers) if paths else None
  if records and len(records) != len(config.tasks):
    raise bad_value(
      key,
      paths,
      f"(), or one store for each of the {len(config.tasks)} tasks, in their order",
      "Correct it",
    )
  given: Sequence[MultiTeacherStore | None] = records or [None] * len(config.tasks)
  limits = [len(store) if store and split == "heldout" else 0 for store in given]
  tasks = open_tasks(config, student, split, limits)
  ranges = dataset.class_ranges(tasks)
  return [
    RecordedTask(examples, store, ranges[name])
    for store, (name, examples) in zip(given, tasks.items(), strict=True)
  ]


def open_tasks(
  config: Config,
  student: ModelSource | None = None,
  split: str = "train",
  limits: Sequence[int] = (),
) -> dict[str, TaskExamples]:
  """Opens the examples of each task, and checks that the student fits them.

  Args:
    config: The config of the run.
    student: The model to train; None to open config.student.
    split: "train" or "heldout".
    limits: Maximum number of rows of each task; 0 for all.
  """
  student = student or loading.open_source(config.student, config.seed)
  tasks = {
    name: dataset.open_examples(config, name, split, student.pretrained, limit)
    for name, limit in zip(config.tasks, limits or [0] * len(config.tasks), strict=True)
  }
  model_checks.check_model(tasks, student.config)
  return tasks


def _open_records(
  key: str,
  paths: Sequence[str],
  teachers_key: str,
  teachers: Mapping[str, Sequence[str]],
) -> list[MultiTeacherStore]:
  if not paths:
    expected = "one folder or more, with stores of records"
    raise bad_value(key, paths, expected, "Run `record` and name its folder")
  stores = [open_store(path) for path in paths]
  check_mixture(key, [store.manifest for store in stores])
  for name, of_teacher in teachers.items():
    if len(of_teacher) != len(stores):
      raise bad_value(
        f"{teachers_key}.{name}",
        of_teacher,
        f"{len(stores)} stores, one of the same text for each of {key}",
        "Correct it",
      )
  others = {
    name: [open_store(path) for path in of_teacher] for name, of_teacher in teachers.items()
  }
  for name, opened in others.items():
    check_mixture(f"{teachers_key}.{name}", [store.manifest for store in opened])
  return [
    MultiTeacherStore(store, {name: of_teacher[i] for name, of_teacher in others.items()})
    for i, store in enumerate(stores)
  ]


def check_mixture(key: str, manifests: Sequence[Manifest]) -> None:
  """Checks that rows of some stores can be in one batch, where missing fields would be zeros.

  Args:
    key: The config key of the stores, for messages.
    manifests: Their manifests.

  Raises:
    InputError: A field that some stores lack would be read as a log-probability or reward of 0.
  """
  for what, has in (
    ("records of kind 'labels'", {m.kind == "labels" for m in manifests}),
    ("scalars of texts that a student wrote", {m.spec.rollout for m in manifests}),
  ):
    if len(has) > 1:
      raise InputError(
        f"Some of the stores in {key} hold {what}, others do not; expected all or none, because a "
        "batch has rows of all stores. Train on them in different runs."
      )


def teacher_manifest(stores: Stores) -> Manifest:
  """Returns the manifest of the first store with targets of a teacher, else of the first store."""
  manifests = [store.manifest for store in stores]
  return next((m for m in manifests if m.kind != "text"), manifests[0])


def recorded(config: Config, stores: Stores) -> Recorded:
  """Returns metadata of the recorded targets in these stores."""
  manifest = teacher_manifest(stores)
  return collate.recorded_of(
    dataclasses.replace(manifest, taps=None) if config.train.online else manifest
  )


def reader(config: Config, stores: Stores) -> collate.Read | None:
  """Returns the function that makes a batch of their fields; None for text in student tokens."""
  if isinstance(stores[0], AlignedStore):
    return student_rows.read
  return dataset.reader(config.tasks)


def lengths(config: Config, stores: Stores) -> tuple[int, ...]:
  """Returns the length of each store's sequences; () for tasks, whose batches have one form."""
  return () if config.tasks else tuple(store.manifest.seq_len for store in stores)


def device_batches(config: Config, stores: Stores, mesh: Mesh, start: int = 0) -> Iterator[Batch]:
  """Returns every global batch from step `start` on, as arrays on the devices.

  Args:
    config: The config of the run.
    stores: The stores it trains on.
    mesh: The mesh.
    start: The first step.
  """
  sizes = loader.batch_sizes(lengths(config, stores), config.train.batch_size)
  rows = functools.cache(functools.partial(sharding.rows, mesh))

  def global_batch(own: Batch) -> Batch:
    size = sizes.get(own.labels_BT.shape[1], config.train.batch_size)
    return collate.to_device(own, rows(size))

  return map(global_batch, batches(config, stores, start, lambda size: rows(size).held))


def batches(
  config: Config,
  stores: Stores,
  start: int = 0,
  held: Callable[[int], np.ndarray] | None = None,
) -> Iterator[Batch]:
  """Yields this process's rows of every global batch from step `start` on, as numpy arrays.

  Args:
    config: The config of the run.
    stores: The stores it trains on.
    start: The first step.
    held: See `loader.batches`.
  """
  c = config.train
  return loader.batches(
    stores,
    batch_size=c.batch_size,
    seed=config.seed,
    start=start,
    mixture=c.mixture,
    targets=not c.online,
    lengths=lengths(config, stores),
    held=held,
    read=reader(config, stores),
    recorded=recorded(config, stores),
  )
