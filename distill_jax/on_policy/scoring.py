"""The teachers' scores of the texts of a round, which are stored for its steps.

The store of a teacher's scores has the rows of its texts, with their rollout scalars, and is
written and resumed as by `record`. It belongs to one store of texts: if these were sampled again,
the scores are deleted and computed again. Servers score the texts if generate.server.urls is set. A
teacher with other tokens than the student reads its own tokens of the texts; see other_tokens.py.

A process holds one teacher and two batches. It writes a shard in P of a store, where P is the
number of processes that write, and looks up as many.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jax.sharding import Mesh

from distill_jax.config import Config
from distill_jax.data import corpus as corpora
from distill_jax.errors import InputError, bad_value
from distill_jax.hub.tokenizer import check_vocabulary
from distill_jax.models.loading import ModelSource
from distill_jax.nn import sharding
from distill_jax.on_policy import checks, other_tokens
from distill_jax.on_policy.other_tokens import OtherTokens
from distill_jax.on_policy.round_folders import folder_of
from distill_jax.records import job, manifest, tap_features
from distill_jax.records.job import Teacher
from distill_jax.records.loaded_teacher import LoadedTeacher
from distill_jax.records.options import RecordsOptions
from distill_jax.records.packed_rows import PackedRows
from distill_jax.records.recording import Corpus
from distill_jax.records.store import Store, open_store
from distill_jax.runtime import distributed, files, storage

if TYPE_CHECKING:
  from distill_jax.served.teacher import ServedTeacher

FOLDER = "records"  # in the folder of a teacher's round


class Scorer:
  """Scores the texts of each round with the teachers of a run.

  One teacher is on the devices at a time, from the first text that it scores until another one is
  needed. Compiled programs are kept.

  Args:
    config: The config of the run.
    student: The student, without weights.
    teachers: The teachers that score texts, by name, without weights.
    mesh: The devices.
    folder: The folder of the run.
  """

  def __init__(
    self,
    config: Config,
    student: ModelSource,
    teachers: Mapping[str, ModelSource],
    mesh: Mesh,
    folder: Path,
  ):
    self._config, self._student, self._teachers = config, student, teachers
    self._mesh, self._folder = mesh, folder
    self._is_served = bool(config.generate.server.urls)
    # By the value of the teachers' config keys, which several teachers may share.
    self._others: dict[str, OtherTokens | None] = {}
    self._runners: dict[str, LoadedTeacher] = {}

  def check(self) -> None:
    """Checks everything that can be checked before weights are read. All processes call it.

    Raises:
      InputError: The config and the teachers do not fit together.
    """
    options, mesh = self._config.records, self._mesh
    _check_options(options)
    sharding.check_batch("records.batch_size", options.batch_size, mesh)
    if self._is_served:
      self._check_alone()
      return
    for source in self._teachers.values():
      # Raises InputError if the mesh does not divide the teacher.
      sharding.shardings(source.abstract, mesh, source.compute.rules)
      self._check_text(source)
      source.check_digest()

  def check_servers(self) -> None:
    """Checks that the servers can score the texts, if servers do. All processes call it.

    Raises:
      InputError: They cannot.
      Unavailable: No server answers.
    """
    if self._is_served:
      with self._served() as served:
        served.check_before(self._config.generate.cache_len)

  def score(self, number: int, teacher: str, rollouts: Store) -> Store:
    """Returns the store of a teacher's scores of its texts in a round; missing ones are computed.

    Args:
      number: The number of the round.
      teacher: The name of the teacher.
      rollouts: The store of its texts.

    Raises:
      InputError: The texts cannot be scored.
      Unavailable: No server answers.
      Preempted: SIGTERM was received. Finished shards are kept.
    """
    folder = folder_of(self._folder, number, teacher) / FOLDER
    digest = rollouts.manifest.digest
    distributed.run_on_process_0(functools.partial(_delete_others, folder, digest))
    source, mesh, size = self._teachers[teacher], self._mesh, self._config.records.batch_size
    with contextlib.ExitStack() as stack:
      served = stack.enter_context(self._served()) if self._is_served else None
      texts = self._corpus(source, rollouts)
      identity = served.identity if served else None
      opened = job.open_part(self._options(texts), source, texts, folder, mesh, size, identity)
      part = stack.enter_context(opened)
      if served:
        served.check([part])
      runner: Teacher = served or self._runner(source, texts)
      job.record("on_policy", [part], runner, mesh, f"round {number}: score")
    return open_store(storage.location(folder), {"corpus": digest})

  def _options(self, texts: Corpus) -> RecordsOptions:
    """Returns the options of a store, with a shard to write for every process."""
    options = self._config.records
    writers = len(np.unique(sharding.rows(self._mesh, options.batch_size).writer_B))
    tokens = min(options.tokens_per_shard, -(-len(texts.rows) // writers) * texts.positions)
    return dataclasses.replace(options, tokens_per_shard=tokens, served=self._is_served)

  def _corpus(self, teacher: ModelSource, rollouts: Store) -> Corpus:
    """Returns the texts of a round as the rows to record."""
    other = None if self._is_served else self._other_tokens(teacher)
    if other is not None:
      return other.corpus(rollouts)
    m, rows = rollouts.manifest, PackedRows(rollouts)
    return Corpus(rows, m.seq_len, m.vocab_size, m.tokenizer, m.digest, rollout=m.rollout)

  def _other_tokens(self, teacher: ModelSource) -> OtherTokens | None:
    """Returns what a teacher with other tokens than the student's needs; None for others."""
    named = teacher.options.source
    if named not in self._others:
      self._others[named] = other_tokens.find(self._config, self._student, teacher)
    return self._others[named]

  def _runner(self, source: ModelSource, texts: Corpus) -> LoadedTeacher:
    """Returns a teacher, after freeing the memory of the others."""
    own = source.options.source
    for name, runner in self._runners.items():
      if name != own:
        runner.release()
    if own not in self._runners:
      self._runners[own] = LoadedTeacher(self._config, source, self._mesh, texts)
    return self._runners[own]

  def _served(self) -> ServedTeacher:
    """Returns the teacher on servers."""
    from distill_jax.served.teacher import ServedTeacher  # needs an extra

    is_chat = other_tokens.prompts_are_chats(self._config)
    return ServedTeacher(self._config, self._student.pretrained, is_chat)

  def _check_alone(self) -> None:
    """Raises InputError if servers would have to score for several teachers."""
    if (count := len(self._teachers)) > 1:
      raise InputError(
        f"generate.server.urls is set; expected no servers with the {count} teachers of "
        "the prompts, since servers have one model. Remove the key, or use one teacher."
      )

  def _check_text(self, teacher: ModelSource) -> None:
    """Raises InputError if a teacher cannot read the student's texts."""
    config, length = self._config, self._config.generate.cache_len
    if (other := self._other_tokens(teacher)) is not None:
      length = other.positions
    else:
      tokenizer = corpora.tokenizer_of(config.data, self._student.pretrained)
      check_vocabulary(tokenizer.vocab_size, teacher.text_config.vocab_size, tokenizer.where)
    checks.check_positions(length, teacher.name, teacher)


def _delete_others(folder: Path, digest: str) -> None:
  """Deletes scores of other texts than those with this digest."""
  where = storage.location(folder)
  found = manifest.find(where)
  if found is not None and found.corpus != digest:
    print(f"{where} holds scores of other texts; it is deleted.", file=sys.stderr)
    files.remove_tree(where)


def _check_options(options: RecordsOptions) -> None:
  """Raises InputError for options of `records` that do not fit sampled texts."""
  if options.kind == "text":
    expected = "a kind with the teacher's targets with train.online=False"
    action = "Set it to 'sampled', 'topk' or 'labels'"
    raise bad_value("records.kind", options.kind, expected, action)
  why = "for `on_policy`, whose texts are the student's"
  for key in ("logprobs", "student_tokenizer"):
    if found := getattr(options, key):
      raise bad_value(f"records.{key}", found, f"'' {why}", "Remove the key")
  tap_features.check(options, of_task=False)
