"""The set-up of a run in rounds: checks of its config, its teachers, and its stores."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from distill_jax.config import Config
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError, bad_value
from distill_jax.generation.job import GenerationJob
from distill_jax.generation.options import ServerOptions
from distill_jax.losses import FeatureLoss
from distill_jax.models import loading
from distill_jax.models.loading import ModelSource
from distill_jax.on_policy.prompt_index import TEACHER
from distill_jax.on_policy.round_folders import FOLDER
from distill_jax.records import fields, manifest, recording
from distill_jax.records.multi_teacher import MultiTeacherStore
from distill_jax.records.store import Store
from distill_jax.training import stores
from distill_jax.training.stores import Stores


def check(config: Config) -> None:
  """Checks the keys of other sections that rounds cannot be combined with.

  Raises:
    InputError: A key has such a value.
  """
  c = config.train
  if config.tasks:
    expected = "an empty section with `on_policy`, whose student continues texts"
    raise bad_value("tasks", ", ".join(config.tasks), expected, "Remove the tasks")
  if c.teachers:
    expected = "{} with `on_policy`, where the prompts name their teachers"
    raise bad_value("train.teachers", c.teachers, expected, "Use `teachers`")
  if bool(c.records) != bool(config.on_policy.records_fraction):
    expected = "a fraction above 0 with train.records" if c.records else "0 without train.records"
    action = "Set the fraction of steps that train on records, or remove train.records"
    raise bad_value(
      "on_policy.records_fraction", config.on_policy.records_fraction, expected, action
    )
  if c.online and config.generate.server.urls:
    raise InputError(
      "generate.server.urls is set; expected no servers with train.online=True, where the teacher "
      "runs in the step. Remove one of the two."
    )
  for name, fn in config.losses.items():
    if isinstance(fn, FeatureLoss) and fn.fits_adapters:
      raise InputError(
        f"losses.{name} fits its projections to a first batch, which `on_policy` does not have "
        "before the student is loaded. Choose another projection."
      )


def sources(config: Config, names: Iterable[str]) -> dict[str, ModelSource]:
  """Opens some of the teachers, by name."""
  options = {
    name: dataclasses.replace(config.teacher, source=s) for name, s in config.teachers.items()
  }
  options |= {TEACHER: config.teacher}
  return {name: loading.open_source(options[name], config.seed) for name in names}


def sampling_job(config: Config, student: ModelSource) -> GenerationJob:
  """Returns the job of sampling texts from the student, which runs on local devices."""
  return dataclasses.replace(
    GenerationJob.from_config(config),
    model=student.options,
    open_model=lambda: student,
    server=ServerOptions(),
  )


def as_training(config: Config, folder: Path) -> Config:
  """Returns the config of training on the texts of rounds, which train.records names first.

  The teachers of `teachers` take turns as the one teacher of a step.
  """
  train = dataclasses.replace(config.train, records=(str(folder / FOLDER), *config.train.records))
  return dataclasses.replace(config, teachers={}, train=train)


def open_records(config: Config, student: ModelSource) -> Stores:
  """Opens the stores in train.records; () without them."""
  return stores.open_stores(config, student) if config.train.records else ()


def planned_store(
  config: Config, tokenizer: Tokenizer, folder: Path, prompts: str
) -> MultiTeacherStore:
  """Returns a stand-in for the stores of the rounds: their manifest, without records.

  Args:
    config: The config of the run.
    tokenizer: The student's tokenizer.
    folder: The folder of the run.
    prompts: The digest of the prompts.
  """
  options = config.records
  if config.train.online:
    options = dataclasses.replace(options, kind="text", taps=())
  rows = config.train.batch_size * config.on_policy.every
  planned = recording.planned_manifest(
    options, tokenizer.vocab_size, rows, config.generate.cache_len
  )
  digest = config.teacher.digest
  planned = dataclasses.replace(
    planned,
    tokenizer=tokenizer.digest,
    sequences_per_shard=rows,  # the size of shards may change between two calls
    corpus=prompts,
    teacher={"digest": digest} if digest and options.kind != "text" else {},
  )
  scalars = fields.rollout_scalars(bool(config.on_policy.reward))
  rollout = {"round": 0, "student": "", "sampling": {}, "scalars": scalars}
  where = folder / FOLDER
  return MultiTeacherStore(Store(where, manifest.with_rollout(planned, rollout)), {})
