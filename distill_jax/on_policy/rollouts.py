"""The texts of a round, which the student samples and which are stored by teacher.

A text depends on (seed, round, prompt, sample) and the student's weights. Its row in a store is
determined by the plan, so a round that was stopped continues with the shards that are missing. All
processes decode all rows; process 0 writes. A process holds 8 bytes per prompt of the run and the
caches, which are freed before training continues. The decoding programs are compiled in the first
round.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from distill_jax.config import Config
from distill_jax.data import corpus
from distill_jax.errors import InputError
from distill_jax.generation import local, placement
from distill_jax.generation.prompts import Prompts
from distill_jax.generation.scheduler import Scheduler, Task
from distill_jax.models import DecoderConfig
from distill_jax.models.loading import LoadedModel, ModelSource
from distill_jax.on_policy import plan as plan_lib
from distill_jax.on_policy import prompt_index, rewards, round_counts, round_folders, run_setup
from distill_jax.on_policy.plan import Plan
from distill_jax.on_policy.prompt_index import TEACHER, PromptIndex
from distill_jax.on_policy.round_folders import FOLDER, folder_of
from distill_jax.on_policy.round_writer import ROLLOUTS, RoundWriter, Row
from distill_jax.records import fields, recording
from distill_jax.records import manifest as manifest_lib
from distill_jax.records.manifest import Manifest
from distill_jax.records.options import RecordsOptions
from distill_jax.records.shard_writer import writing
from distill_jax.records.store import Store, open_store
from distill_jax.runtime import distributed, files, json_io, storage
from distill_jax.runtime.progress import Progress
from distill_jax.types import JsonObject

PROMPTS = "prompts.npz"  # in the folder of rounds: the places of the prompts
SUMMARY = "rollouts.json"  # in the folder of a round
READ_AT_ONCE = 64  # texts whose prompts are read together

Missing = list[tuple[str, range]]  # the shards to write: the teacher, and the rows


class Rollouts:
  """Samples the texts of each round from the student.

  Args:
    config: The config of the run.
    student: The student, without weights.
    mesh: The devices.
    folder: The folder of the run.

  Attributes:
    plan: The plan of the rounds, after `check`.
  """

  plan: Plan

  def __init__(self, config: Config, student: ModelSource, mesh: Mesh, folder: Path):
    self._config, self._student, self._mesh, self._folder = config, student, mesh, folder
    self._job = run_setup.sampling_job(config, student)

  def check(self) -> None:
    """Checks everything that can be checked before weights are read. All processes call it.

    Raises:
      InputError: The config, the student and the prompts do not fit together.
    """
    c, job = self._config, self._job
    plan_lib.check(c)
    round_counts.check_options(c.on_policy)
    if not isinstance(self._student.config, DecoderConfig):
      raise InputError(
        f"on_policy needs a student that continues texts, but {self._student.name} does not. "
        "Choose another student."
      )
    self._judge = rewards.open_judge(c)
    self._tokenizer = corpus.tokenizer_of(c.data, self._student.pretrained)
    self._stops = local.check_settings(job, self._tokenizer, self._mesh)
    self.plan = Plan.from_config(c, self._open_prompts())

  def _open_prompts(self) -> PromptIndex:
    c, job = self._config, self._job
    teachers = (TEACHER, *c.teachers)
    settings = {
      "tokenizer": self._tokenizer.digest,
      "teachers": teachers,
      "reward": c.on_policy.reward,
      "cache_len": job.decoding.cache_len,
      **{key: getattr(job, key) for key in ("field", "template", "chat", "on_bad")},
    }
    unusable = (
      None
      if self._judge is None
      else functools.partial(rewards.without_key, self._judge, job.on_bad)
    )
    file = files.join(storage.location(self._folder), f"{FOLDER}/{PROMPTS}")
    return prompt_index.open_index(
      Prompts(job, self._tokenizer), teachers, file, settings, unusable
    )

  def manifest(self, number: int, teacher: str, fingerprint: str, texts: int) -> Manifest:
    """Returns the manifest of a teacher's texts in a round.

    Args:
      number: The number of the round.
      teacher: The name of the teacher.
      fingerprint: The fingerprint of the student's weights.
      texts: The number of texts.
    """
    job = self._job
    options = RecordsOptions(kind="text", tokens_per_shard=self._config.records.tokens_per_shard)
    planned = recording.planned_manifest(
      options, self._tokenizer.vocab_size, texts, job.decoding.cache_len
    )
    source = [self.plan.prompts.digest, job.seed, number, teacher]
    sampling = {
      **dataclasses.asdict(job.sampling),
      **{key: getattr(job, key) for key in ("max_new_tokens", "stop", "repetition")},
    }
    return manifest_lib.with_rollout(
      dataclasses.replace(
        planned,
        tokenizer=self._tokenizer.digest,
        corpus=hashlib.sha256(json.dumps(source).encode()).hexdigest(),
      ),
      {
        "round": number,
        "student": fingerprint,
        "sampling": json.loads(json.dumps(sampling)),
        "scalars": fields.rollout_scalars(self._judge is not None),
      },
    )

  def generate(
    self, number: int, fingerprint: str, model: Callable[[], LoadedModel]
  ) -> dict[str, Store]:
    """Returns the store of each teacher's texts in a round; texts that are missing are sampled.

    Args:
      number: The number of the round.
      fingerprint: The fingerprint of the student's weights. Texts of other weights are deleted.
      model: Returns the student, whose arrays are deleted. Called if texts are missing.

    Raises:
      InputError: Too many texts were cut off or are repetitions, or a text cannot be judged.
      Preempted: SIGTERM was received. Finished shards are kept.
    """
    self.plan.prompts.save()
    rows, folder = self.plan.of_round(number).rows, folder_of(self._folder, number)
    if not rows:  # all steps of the round train on train.records
      return {}
    manifests = {
      name: self.manifest(number, name, fingerprint, len(own)) for name, own in rows.items()
    }
    distributed.run_on_process_0(lambda: _discard_others(folder, manifests))
    with ExitStack() as stack:
      writers: list[RoundWriter] = []  # one on the first process, none on others
      distributed.run_on_process_0(
        lambda: writers.append(
          stack.enter_context(RoundWriter(folder, manifests, self._stops, self._judge))
        )
      )
      if missing := _missing(list(rows), writers):
        self._sample(number, missing, rows, writers, model)
      distributed.run_on_process_0(lambda: self._finish(number, fingerprint, writers[0]))
    return {name: open_store(storage.location(folder / name / ROLLOUTS)) for name in rows}

  def summary(self, number: int) -> JsonObject:
    """Returns the numbers of a finished round; see `round_counts.summary`."""
    file = _summary(folder_of(self._folder, number))
    return json_io.parse_object(files.read(file), file, "Delete the folder of the round")

  def _sample(
    self,
    number: int,
    missing: Missing,
    rows: Mapping[str, Sequence[tuple[int, int]]],
    writers: Sequence[RoundWriter],
    model: Callable[[], LoadedModel],
  ) -> None:
    """Samples the texts of the missing shards."""
    total = sum(map(len, rows.values()))
    found = total - sum(len(shard) for _, shard in missing)
    reasons: Counter[str] = Counter()
    with (
      jax.set_mesh(self._mesh),
      distributed.Preemption() as preemption,
      Progress(f"round {number}: sample", total, "texts", start=found, brief=True) as progress,
    ):
      scheduler = self._scheduler(number, model)
      for writer in writers:
        writer.start()
      began, tokens = time.perf_counter(), 0
      for finished, new_tokens in scheduler.run(self._tasks(missing, rows)):
        tokens += new_tokens
        for writer in writers:
          writer.add(finished)
        reasons.update(s.reason for s in finished)
        round_counts.check(self._config.on_policy, number, reasons, total)
        progress.add(len(finished), tokens_per_second=tokens / (time.perf_counter() - began))
        if preemption.reached():
          raise distributed.Preemption.stop("on_policy", "finished shards of texts are kept")

  def _scheduler(self, number: int, model: Callable[[], LoadedModel]) -> Scheduler:
    loaded, job = model(), self._job
    unrolled = placement.place(loaded.model, loaded.compute, self._mesh, job.decoding)
    return local.make_scheduler(
      job, self._mesh, self._tokenizer, self._stops, unrolled, loaded.compute, fold=number
    )

  def _tasks(
    self, missing: Missing, rows: Mapping[str, Sequence[tuple[int, int]]]
  ) -> Iterator[Task]:
    """Yields the missing texts in the order of their rows."""
    for name, shard in missing:
      for first in range(shard.start, shard.stop, READ_AT_ONCE):
        some = range(first, min(first + READ_AT_ONCE, shard.stop))
        numbers = sorted({rows[name][i][0] for i in some})
        prompts = {p.number: p for p in self.plan.prompts.read(numbers)}
        for i in some:
          number, sample = rows[name][i]
          yield Task(number, sample, prompts[number].ids, Row(name, i, prompts[number]))

  def _finish(self, number: int, fingerprint: str, writer: RoundWriter) -> None:
    """Completes the stores and writes the numbers of the round.

    Raises:
      InputError: Too many texts were cut off or are repetitions.
    """
    found = round_counts.summary(writer.finish())
    found = {"round": number, "student": fingerprint, **found}
    file = _summary(folder_of(self._folder, number))
    with writing(file):
      files.write(file, json.dumps(found, indent=1).encode())
    round_counts.check(self._config.on_policy, number, found["reasons"], found["texts"])


def _discard_others(folder: Path, manifests: Mapping[str, Manifest]) -> None:
  """Deletes a round whose texts were sampled by other weights, or that was partly deleted."""
  if round_folders.is_partly_deleted(folder):
    round_folders.delete(folder)
    return
  for name, want in manifests.items():
    found = manifest_lib.find(storage.location(folder / name / ROLLOUTS))
    if found is not None and found.rollout.get("student") != want.rollout["student"]:
      print(
        f"The texts in {storage.location(folder)} are of other weights of the student. They are "
        "deleted and sampled again.",
        file=sys.stderr,
      )
      round_folders.delete(folder)
      return


def _missing(teachers: Sequence[str], writers: Sequence[RoundWriter]) -> Missing:
  """Returns the missing shards, which the first process knows, on all processes."""
  own = [
    (teachers.index(name), shard.start, shard.stop)
    for writer in writers
    for name, shards in writer.missing().items()
    for shard in shards
  ]
  count = int(distributed.broadcast_from_process_0(np.array(len(own), np.int32)))
  array = np.array(own, np.int32) if own else np.zeros((count, 3), np.int32)
  found = distributed.broadcast_from_process_0(array.reshape(count, 3)).tolist()
  return [(teachers[i], range(start, stop)) for i, start, stop in found]


def _summary(folder: Path) -> str:
  return files.join(storage.location(folder), SUMMARY)
