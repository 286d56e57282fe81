"""The teachers of rounds of `on_policy` in preflight: their texts, their tokens and their time.

Each teacher scores its part of the texts, that of its prompts; without files of prompts, all parts
are assumed to be equal. A teacher with other tokens than the student's reads its own tokens of the
texts, in rows of `OtherTokens.positions`, and its distributions are projected. The tokens of a
model with a named shape, whose files are not read, are assumed to be the student's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.config import Config
from distill_jax.generation import placement
from distill_jax.generation.prompts import Prompts
from distill_jax.models.loading import ModelSource
from distill_jax.nn import params, sharding
from distill_jax.on_policy import other_tokens, prompt_index, run_setup
from distill_jax.on_policy.other_tokens import OtherTokens
from distill_jax.on_policy.prompt_index import TEACHER
from distill_jax.preflight import (
  decoding,
  estimate,
  flops,
  other_tokenizer,
  roofline,
)
from distill_jax.preflight.topology import Hardware
from distill_jax.retarget.options import RetargetOptions
from distill_jax.runtime import files


class RoundTeacher(NamedTuple):
  """A teacher of a run.

  Attributes:
    source: The model, without weights.
    share: The part of the texts that it scores.
    run: The config of training with it as the only teacher; see `as_training`.
    other: What it needs if it has other tokens than the student; else None.
  """

  source: ModelSource
  share: Fraction
  run: Config
  other: OtherTokens | None


class OtherTeachers(NamedTuple):
  """The teachers that are not an argument of the training step.

  Attributes:
    weights: Bytes per device. With train.online, all `teachers` are in memory; with stored scores,
      the largest teacher, since one at a time is. Tables of other tokens are included.
    seconds: The lower bound for the scores of a round, without the time to load teachers.
  """

  weights: int = 0
  seconds: float = 0.0


def as_training(config: Config, other: OtherTokens | None = None) -> Config:
  """Returns the config of training on stored rows of the same length, generate.cache_len.

  Each step has the texts of one teacher, so `teachers` are not in it.

  Args:
    config: The config.
    other: What `teacher` needs if it has other tokens than the student; else None. Its rows then
      have data.seq_len tokens, and the student's retarget.seq_len.
  """
  length = config.generate.cache_len
  positions = length if other is None else other.positions
  data = dataclasses.replace(config.data, seq_len=positions, buckets=())
  retarget, records = RetargetOptions(), config.records
  if other is not None:
    tokenizer = config.data.tokenizer or config.student.source
    retarget = RetargetOptions(tokenizer=tokenizer, seq_len=length)
    records = dataclasses.replace(records, student_tokenizer=tokenizer)
  return dataclasses.replace(config, data=data, teachers={}, retarget=retarget, records=records)


def find(config: Config, student: ModelSource) -> dict[str, RoundTeacher]:
  """Returns the teachers that run on the devices, by name; {} if servers score the texts.

  Raises:
    InputError: Prompts cannot be used, or a teacher cannot have other tokens than the student.
  """
  online = config.train.online
  if config.generate.server.urls and not online:
    return {}
  shares = _shares(config, student)
  kept = {n: share for n, share in shares.items() if share or (online and n == TEACHER)}
  found = {}
  for name, source in run_setup.sources(config, kept).items():
    other = _other_tokens(config, student, source)
    run = as_training(dataclasses.replace(config, teacher=source.options), other)
    found[name] = RoundTeacher(source, kept[name], run, other)
  return found


def has_prompts(config: Config) -> bool:
  """Returns whether there are files of prompts."""
  path = config.generate.prompts
  return bool(path) and (files.info(path) is not None or bool(files.listing(path)))


def _shares(config: Config, student: ModelSource) -> dict[str, Fraction]:
  """Returns each teacher's part of the texts."""
  names = (TEACHER, *config.teachers)
  if len(names) == 1 or not has_prompts(config):
    return dict.fromkeys(names, Fraction(1, len(names)))
  counts = prompt_index.counts(Prompts(run_setup.sampling_job(config, student)), names)
  return {name: Fraction(counts[name], counts.total()) for name in names}


def _other_tokens(config: Config, student: ModelSource, teacher: ModelSource) -> OtherTokens | None:
  is_known = teacher.tokenizer is not None and (config.data.tokenizer or student.tokenizer)
  return other_tokens.find(config, student, teacher) if is_known else None


def step_flops(teachers: Mapping[str, RoundTeacher], rows: int) -> dict[str, float]:
  """Returns the operations of a training step with online teachers; see flops.step_flops.

  They are the mean over the teachers' texts.

  Args:
    teachers: The teachers.
    rows: The number of texts of a step.
  """
  total: dict[str, float] = {}
  for teacher in teachers.values():
    for purpose, n in flops.step_flops(teacher.run, "train", rows).items():
      total[purpose] = total.get(purpose, 0.0) + float(teacher.share) * n
  return total


def outside_step(
  config: Config,
  teachers: Mapping[str, RoundTeacher],
  rows: int,
  hardware: Hardware,
  mesh: jax.sharding.Mesh,
) -> OtherTeachers:
  """Returns the teachers outside the training step.

  Args:
    config: The config.
    teachers: The teachers, from `find`.
    rows: The number of texts of a round.
    hardware: The slices.
    mesh: The devices.

  Raises:
    InputError: The mesh does not divide a batch or a model.
  """
  sizes = {name: _bytes(teacher, mesh) for name, teacher in teachers.items()}
  if config.train.online:
    return OtherTeachers(sum(n for name, n in sizes.items() if name != TEACHER))
  if not teachers:
    return OtherTeachers()
  batch = config.records.batch_size
  sharding.check_batch("records.batch_size", batch, mesh)
  seconds = sum(
    math.ceil(rows * teacher.share / batch) * _pass_seconds(teacher, sizes[name], hardware, mesh)
    for name, teacher in teachers.items()
  )
  return OtherTeachers(max(sizes.values()), seconds)


def _bytes(teacher: RoundTeacher, mesh: jax.sharding.Mesh) -> int:
  """Returns the bytes per device of a teacher's weights and tables."""
  weights = estimate.model_bytes(teacher.source, mesh)
  if teacher.other is None:
    return weights
  return weights + placement.bytes_per_device(
    other_tokenizer.table_shapes(teacher.other.dense_tables, mesh)
  )


def _pass_seconds(
  teacher: RoundTeacher, moved: int, hardware: Hardware, mesh: jax.sharding.Mesh
) -> float:
  """Returns the lower bound for the scores of records.batch_size rows.

  A pass gathers the weights over fsdp, and sums activations over the tensor axis.

  Args:
    teacher: The teacher.
    moved: The bytes per device of its weights and tables.
    hardware: The slices.
    mesh: The devices.
  """
  run, source = teacher.run, teacher.source
  rows, positions = run.records.batch_size, run.data.seq_len
  dtype = jnp.dtype(run.teacher.dtype)
  used = params.count(source.abstract) * dtype.itemsize / mesh.shape["tensor"]
  shards = mesh.shape["fsdp"] * mesh.shape["context"]
  own_tokens = rows / sharding.row_shards(mesh) * positions / mesh.shape["context"]
  sent = {
    "all-gather": int(used * (shards - 1) / shards),
    "all-reduce": decoding.tensor_sums(source, mesh, own_tokens),
  }
  operations = flops.step_flops(run, "record", rows)
  bound = roofline.speed(run, "record", hardware, mesh, operations, moved, sent)
  return float(bound["step_seconds_bound"])
