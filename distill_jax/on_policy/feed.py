"""The texts of rounds as the batches of a training run.

Before the first step of a round, the student samples its texts and the teachers score them, unless
they run in the step. Texts and scores are stores on disk, which are kept if the run is killed: it
continues from its last checkpoint, and a store is used again if its texts are those of the student
that the repeated steps lead to. A checkpoint within a round names the students of the texts that
the round still needs, because they cannot be sampled again.

A process holds the rows of the batches that are read ahead, and the disk the last
on_policy.keep_rounds rounds besides those that the last checkpoints need.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh

from distill_jax.config import Config
from distill_jax.data import corpus, token_bytes
from distill_jax.errors import InputError
from distill_jax.models import runs
from distill_jax.models.loading import LoadedModel, ModelSource
from distill_jax.nn import sharding
from distill_jax.on_policy import (
  checks,
  diagnosis,
  other_tokens,
  own_texts_file,
  plan,
  round_counts,
  round_schedule,
  run_setup,
)
from distill_jax.on_policy.plan import StepRows
from distill_jax.on_policy.prompt_index import TEACHER
from distill_jax.on_policy.rollouts import Rollouts
from distill_jax.on_policy.round_folders import RoundFolders
from distill_jax.on_policy.round_schedule import RoundSchedule
from distill_jax.on_policy.round_scores import RoundScores
from distill_jax.on_policy.scoring import Scorer
from distill_jax.records import collate, student_rows
from distill_jax.records.store import Store
from distill_jax.records.student_rows import StudentRows
from distill_jax.runtime import checkpoint, distributed
from distill_jax.training import loader, stores
from distill_jax.training.decoding_copy import decoding_copy
from distill_jax.training.feed import StepData
from distill_jax.training.outputs import Teachers
from distill_jax.training.state import TrainInputs, with_tables
from distill_jax.training.step import Step
from distill_jax.training.stores import OneStore, Stores
from distill_jax.training.train_state import TrainState
from distill_jax.types import Batch, JsonObject

SAMPLED = "sampled"  # key in a checkpoint's metadata: the students that sampled texts, by round


class RoundsFeed:
  """The batches of rounds; a `training.feed.Feed`.

  Args:
    config: The config of the run.
    folder: The folder of the run.
    student: The model to train.
    mesh: The mesh.

  Raises:
    InputError: The config, the models and the prompts do not fit together.
  """

  def __init__(self, config: Config, folder: Path, student: ModelSource, mesh: Mesh):
    round_schedule.check(config)
    run_setup.check(config)
    self._options, self._folder = config.on_policy, folder
    self._tokenizer = corpus.tokenizer_of(config.data, student.pretrained)
    self._student, self._mesh, self._keys = student, mesh, runs.keys(config.seed)
    self._rollouts = Rollouts(config, student, mesh, folder)
    self._rollouts.check()
    self._plan = self._rollouts.plan
    self._schedule = RoundSchedule(config.on_policy.every, config.on_policy.lag, self._plan.rounds)
    names = [name for name, count in self._plan.prompts.counts.items() if count]
    self._sources = run_setup.sources(config, dict.fromkeys((TEACHER, *names)))
    self._several_teachers = len(names) > 1
    teachers = {name: self._sources[name] for name in names}
    if config.train.online:
      checks.check_features(config, self._sources)
    self._scorer = None if config.train.online else self._open_scorer(config, teachers)
    self._scores = None if self._scorer is None else _scores(self._scorer, config)
    for sentence in checks.check(config, student, teachers):
      if distributed.is_process_0():
        print(sentence, file=sys.stderr)
    self._records = run_setup.open_records(config, student)
    self._planned = run_setup.planned_store(
      config, self._tokenizer, folder, self._plan.prompts.digest
    )
    self.config = run_setup.as_training(config, folder)
    online = {TEACHER: self._sources[TEACHER]} if config.train.online else {}
    self.online: Mapping[str, ModelSource] = online
    self._other_tokens = other_tokens.of_teachers(config, student, self._sources if online else {})
    self.stores: Stores = [self._planned_of(TEACHER), *self._records]
    self._folders = RoundFolders(folder, config.on_policy.keep_rounds, config.train.keep)
    self._batch_rows = sharding.rows(mesh, config.train.batch_size)

  def _open_scorer(self, config: Config, teachers: Mapping[str, ModelSource]) -> Scorer:
    """Returns what scores texts, after checking that the teachers can."""
    scorer = Scorer(config, self._student, teachers, self._mesh, self._folder)
    scorer.check()
    return scorer

  def check_servers(self) -> None:
    """Checks the servers that score texts; see `Feed.check_servers`."""
    if self._scorer is not None:
      self._scorer.check_servers()

  def open(self, step: Step, inputs: TrainInputs, start: int, saved: JsonObject) -> None:
    """Loads further teachers of the step, and begins to read records; see `Feed.open`."""
    self._start, self._base, self._fixed = start, inputs.base, inputs.teachers
    self._teachers = {name: self._loaded(name) for name in self._sources}
    self._diagnose = diagnosis.jitted(step, self._mesh)
    self._spell_token = token_bytes.reader(self._tokenizer)
    # The fingerprint of the student that samples or has sampled the texts of a round, by round.
    self._students = {int(number): digest for number, digest in saved.get(SAMPLED, {}).items()}
    self._folders.open(start, self._schedule.already_sampled)
    if self._records:
      before = plan.records_before(start, self._options.records_fraction)
      self._of_records = stores.device_batches(self.config, self._records, self._mesh, before)

  def _loaded(self, name: str) -> Teachers:
    """Returns the teachers in the steps of a teacher's texts, by their names in a batch."""
    if not self.online or name == TEACHER:
      return self._fixed
    model = self._sources[name].load(self._mesh, self._keys["teacher"]).model
    planned = [self._planned_of(name)]
    return with_tables({TEACHER: model}, self.config, planned, self._mesh)

  def _planned_of(self, name: str) -> OneStore:
    """Returns a stand-in for the texts of a teacher, as a teacher in the step reads them."""
    other = self._other_tokens.get(name)
    return other.planned(self._planned) if other else self._planned

  def due(self, step: int) -> bool:
    """Returns whether a step is the first of its round, or the first of this process."""
    return self._schedule.begins(step) or step == self._start

  def begin(self, step: int, state: TrainState) -> None:
    """Samples and scores the texts that are missing; see `Feed.begin`."""
    number = self._schedule.round_of(step)
    began = time.perf_counter()
    texts = {}
    for i in self._schedule.needed(step):
      texts[i] = self._sample(i, step, state)
      if self._scores is not None:
        self._scores.begin(i, texts[i])
    sampled = time.perf_counter()
    stored: Mapping[str, Store | StudentRows] = {
      name: self._other_tokens[name].rows(store) if name in self._other_tokens else store
      for name, store in texts[number].items()
    }
    if self._scores is not None:
      stored = self._scores.get(number, texts[number])
    self._metrics = {
      "generate_seconds": sampled - began,
      "score_seconds": time.perf_counter() - sampled,
    }
    self._number, self._round, self._texts = number, self._plan.of_round(number), stored
    first = step - number * self._schedule.every
    self._batches = self._read(first)
    if self._schedule.begins(step) and stored:  # not all steps of the round train on records
      self._metrics |= round_counts.metrics(self._rollouts.summary(number))
      if diagnosis.due(step, self._schedule.every):
        self._metrics |= self._diagnosed(step, state)
    self._students = {i: self._students[i] for i in self._schedule.needed(step)}
    self._folders.delete_before(number)

  def _sample(self, number: int, step: int, state: TrainState) -> dict[str, Store]:
    """Returns the texts of a round by teacher, those that are missing after sampling them."""
    sampled_before = self._schedule.sampled_before(number)
    if step == sampled_before:
      self._students[number] = checkpoint.params_digest(state.params)

    def student() -> LoadedModel:
      if step == sampled_before:
        return decoding_copy(self._student, state.params, self._base, self._mesh)
      raise InputError(
        f"Round {number} lacks texts, which were sampled before step {sampled_before}. Restore the "
        "folder, or move the checkpoints after that step away to continue from an earlier one."
      )

    return self._rollouts.generate(number, self._students[number], student)

  def _read(self, first: int) -> Iterator[Batch]:
    """Returns this process's rows of the batches of the round's texts, from a step of it on."""
    rows = [r for r in self._round.steps[first:] if r is not None]
    return loader.read_ahead(lambda i: self._of_rows(rows[i]), range(len(rows)))

  def _of_rows(self, rows: StepRows) -> Batch:
    store = self._texts[rows.teacher]
    records = store.read_many([rows.first + i for i in self._batch_rows.held.tolist()])
    if isinstance(store, StudentRows):
      return collate.collate(records, with_targets=False, read=student_rows.read)
    recorded = collate.recorded_of(store.manifest)
    return collate.collate(records, with_targets=not self.online, recorded=recorded)

  def _diagnosed(self, step: int, state: TrainState) -> dict[str, float]:
    """Returns the metrics of the diagnosis of each teacher's first batch in the round."""
    first: dict[str, StepRows] = {}
    for rows in filter(None, self._round.steps):
      first.setdefault(rows.teacher, rows)
    metrics: dict[str, float] = {}
    for name, rows in first.items():
      batch = collate.to_device(self._of_rows(rows), self._batch_rows)
      diagnosed = jax.device_get(self._diagnose(state, batch, self._teachers[name], self._base))
      metrics |= diagnosis.named(diagnosed.metrics, name if self._several_teachers else TEACHER)
      texts = diagnosed.texts | {"teachers": {name: diagnosed.texts["teachers"][TEACHER]}}
      write = functools.partial(own_texts_file.write, self._folder, step, texts, self._spell_token)
      distributed.run_on_process_0(write)
    diagnosis.check_limits(self._options, metrics, step)
    return metrics

  def next(self, step: int) -> StepData:
    """Returns the batch of a step; see `Feed.next`."""
    rows = self._round.steps[step - self._number * self._schedule.every]
    metrics, self._metrics = {"round": self._number} | self._metrics, {}
    if rows is None:
      return StepData(next(self._of_records), self._fixed, metrics)
    metrics["lag"] = step - self._schedule.sampled_before(self._number)
    batch = collate.to_device(next(self._batches), self._batch_rows)
    teachers = self._teachers[rows.teacher]
    return StepData(batch, teachers, metrics, rows.teacher if self._several_teachers else "")

  def metadata(self, step: int) -> JsonObject:
    """Returns the students whose texts a checkpoint before a step needs."""
    sampled = self._schedule.already_sampled(step)
    self._folders.protect(sampled)
    return {SAMPLED: {str(i): self._students[i] for i in sampled}}


def _scores(scorer: Scorer, config: Config) -> RoundScores:
  """Returns the scores of rounds, which are computed ahead if servers can."""
  # The processes of a run talk to each other in order, so that only one can have two threads.
  is_alone = distributed.process_count() == 1
  is_served = bool(config.generate.server.urls)
  return RoundScores(scorer.score, ahead=is_served and is_alone and config.on_policy.lag > 0)
