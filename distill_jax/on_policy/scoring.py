"""The teachers' scores of the texts of a round, which are stored for its steps.

The store of a teacher's scores has the rows of its texts, with their rollout scalars, and is
written and resumed as by `record`. It belongs to one store of texts: if these were sampled again,
the scores are deleted and computed again.

A process holds one teacher and two batches. It writes a shard in P of a store, where P is the
number of processes that write, and looks up as many.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from distill_jax.config import Config
from distill_jax.data import corpus as corpora
from distill_jax.errors import bad_value
from distill_jax.hub.tokenizer import check_vocabulary
from distill_jax.models import loading, long_context
from distill_jax.models.loading import ModelSource
from distill_jax.nn import sharding
from distill_jax.on_policy.rollouts import folder_of
from distill_jax.records import job, manifest, tap_features
from distill_jax.records.loaded_teacher import LoadedTeacher
from distill_jax.records.packed_rows import PackedRows
from distill_jax.records.recorder import Corpus
from distill_jax.records.store import Store, open_store
from distill_jax.runtime import distributed, files, storage

FOLDER = "records"  # in the folder of a teacher's round
TEACHER = "teacher"  # the name of config.teacher


class Scorer:
  """Scores the texts of each round with the teachers of a run.

  One teacher is on the devices at a time, from the first text that it scores until another one is
  needed. Compiled programs are kept.

  Args:
    config: The config of the run.
    student: The student, without weights.
    mesh: The devices.
    folder: The folder of the run.
  """

  def __init__(self, config: Config, student: ModelSource, mesh: Mesh, folder: Path):
    self._config, self._student, self._mesh, self._folder = config, student, mesh, folder
    # By what the teachers' keys name, which several may share.
    self._sources: dict[str, ModelSource] = {}
    self._runners: dict[str, LoadedTeacher] = {}

  def check(self, teachers: Iterable[str]) -> None:
    """Checks everything that can be checked before weights are read. All processes call it.

    Args:
      teachers: The names of the teachers that score texts.

    Raises:
      InputError: The config and the teachers do not fit together.
    """
    options, mesh = self._config.records, self._mesh
    _check_options(self._config)
    sharding.check_batch("records.batch_size", options.batch_size, mesh)
    for name in teachers:
      source = self.source(name)
      sharding.shardings(source.abstract, mesh, source.compute.rules)  # raises if it cannot be
      self._check_text(source)
      positions = {"the sampled texts": self._config.generate.cache_len}
      long_context.check(mesh, positions, [source], of_tasks=False)
      source.check_digest()

  def source(self, teacher: str) -> ModelSource:
    """Returns a teacher by its name, without weights."""
    config = self._config
    named = config.teacher.source if teacher == TEACHER else config.teachers[teacher]
    if named not in self._sources:
      options = dataclasses.replace(config.teacher, source=named)
      self._sources[named] = loading.open_source(options, config.seed)
    return self._sources[named]

  def score(self, number: int, teacher: str, rollouts: Store) -> Store:
    """Returns the store of a teacher's scores of its texts in a round; missing ones are computed.

    Args:
      number: The number of the round.
      teacher: The name of the teacher.
      rollouts: The store of its texts.

    Raises:
      InputError: The texts cannot be scored.
      Preempted: SIGTERM was received. Finished shards are kept.
    """
    folder = folder_of(self._folder, number, teacher) / FOLDER
    source, texts = self.source(teacher), _corpus(rollouts)
    distributed.run_on_process_0(functools.partial(_delete_others, folder, texts.digest))
    options, size = self._config.records, self._config.records.batch_size
    # Fewer tokens per shard than in the config, so that every process has one to write.
    writers = len(np.unique(sharding.rows(self._mesh, size).writer_B))
    tokens = -(-len(texts.rows) // writers) * texts.positions
    options = dataclasses.replace(options, tokens_per_shard=min(options.tokens_per_shard, tokens))
    with job.open_part(options, source, texts, folder, self._mesh, size) as part:
      job.record("on_policy", [part], self._runner(source, texts), self._mesh, "tokens scored")
    return open_store(storage.location(folder), {"corpus": texts.digest})

  def _check_text(self, teacher: ModelSource) -> None:
    """Raises InputError if a teacher cannot read the student's texts."""
    tokenizer = corpora.tokenizer_of(self._config.data, self._student.pretrained)
    shape = teacher.text_config
    check_vocabulary(tokenizer.vocab_size, shape.vocab_size, tokenizer.where)
    length, limit = self._config.generate.cache_len, shape.max_position_embeddings
    if length > limit:
      expected = f"at most {limit}, the number of positions of the teacher {teacher.name}"
      raise bad_value("generate.cache_len", length, expected, "Reduce it")

  def _runner(self, source: ModelSource, texts: Corpus) -> LoadedTeacher:
    """Returns a teacher, after freeing the memory of the others."""
    own = source.options.source
    for name, runner in self._runners.items():
      if name != own:
        runner.release()
    if own not in self._runners:
      self._runners[own] = LoadedTeacher(self._config, source, self._mesh, texts)
    return self._runners[own]


def _corpus(rollouts: Store) -> Corpus:
  """Returns the texts of a round as the rows to record."""
  m = rollouts.manifest
  rows = PackedRows(rollouts)
  return Corpus(rows, m.seq_len, m.vocab_size, m.tokenizer, m.digest, rollout=m.rollout)


def _delete_others(folder: Path, digest: str) -> None:
  """Deletes scores of other texts than those with this digest."""
  where = storage.location(folder)
  found = manifest.find(where)
  if found is not None and found.corpus != digest:
    print(f"{where} holds scores of other texts; it is deleted.", file=sys.stderr)
    files.remove_tree(where)


def _check_options(config: Config) -> None:
  """Raises InputError for options of `records` that do not fit sampled texts."""
  c = config.records
  if c.kind == "text":
    expected = "a kind with the teacher's targets with train.online=False"
    raise bad_value("records.kind", c.kind, expected, "Set it to 'sampled', 'topk' or 'labels'")
  why = "for `on_policy`, whose texts are the student's"
  for key in ("logprobs", "student_tokenizer"):
    if found := getattr(c, key):
      raise bad_value(f"records.{key}", found, f"'' {why}", "Remove the key")
  tap_features.check(c, of_task=False)
