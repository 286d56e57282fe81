"""The training loop: batches, steps, metrics, checkpoints and resuming."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh

from distill_jax.config import Config
from distill_jax.errors import Preempted, Unavailable
from distill_jax.losses import FeatureLoss
from distill_jax.models import loading
from distill_jax.models.loading import ModelSource
from distill_jax.models.runs import Run
from distill_jax.nn import sharding
from distill_jax.records.student_rows import TEACHER
from distill_jax.runtime import best_checkpoint, checkpoint, distributed
from distill_jax.tasks.dataset import RecordedTask
from distill_jax.training import optim, trackers, validate, validate_heldout
from distill_jax.training.best import Best
from distill_jax.training.feed import Feed, StoredFeed
from distill_jax.training.heldout import Benchmarks, Evaluation
from distill_jax.training.metric_writer import read_metrics
from distill_jax.training.run_log import Log, Profile
from distill_jax.training.save_schedule import SaveSchedule
from distill_jax.training.state import online_teachers, prepare
from distill_jax.training.step import Step
from distill_jax.training.stores import (
  Stores,
  open_heldout,
  recorded,
  teacher_manifest,
)
from distill_jax.training.train_state import TrainState
from distill_jax.types import JsonObject


def train(
  config: Config,
  workdir: Path,
  benchmarks: Benchmarks | None = None,
  open_feed: Callable[[ModelSource, Mesh], Feed] | None = None,
) -> JsonObject:
  """Trains the student, starting from the last checkpoint if there is one.

  Args:
    config: The config of the run.
    workdir: The folder of the run.
    benchmarks: Runs the benchmarks in train.eval_benchmarks; None to run none.
    open_feed: Returns the source of its batches, given the student and the mesh; None for the
      stores of the config.

  Returns:
    The metrics of the last step. With train.best_metric also `best_step` and `best_value`, and
    `stopped_early`, True if train.patience ended the run.

  Raises:
    InputError: The config does not fit the data or models. It is checked before anything compiles.
    FloatingPointError: A loss is not finite. The last good checkpoint is kept.
    Preempted: SIGTERM was received. The current step is saved.
    Unavailable: No server answers. The current step is saved.
  """
  began = time.monotonic()
  trackers.check(config.train.tracker)
  student = loading.open_source(config.student, config.seed)
  mesh = config.mesh.make()
  feed: Feed = (open_feed or functools.partial(StoredFeed, config))(student, mesh)
  config, stores, online = feed.config, feed.stores, feed.online
  heldout = open_heldout(config, student, stores)
  validate.check_run(config, stores, student)
  validate_heldout.check(config, stores, heldout, student)
  c = config.train
  validate.check_online(config, stores, heldout, online, student)
  validate.check_mesh(config, stores, [student, *online.values()], mesh)
  step = make_step(config, stores, student, online)
  validate.check_features(config, step, stores)
  evaluation = Evaluation(config, step, stores, heldout, mesh, benchmarks)
  evaluation.check_metrics(student, online)
  if step.trainable.has_base:
    Run(workdir, config, student).pin_base()
  metadata = {"records": [digest for store in stores for digest in store.digests]}
  if heldout:
    metadata["heldout"] = [digest for store in heldout for digest in store.digests]
  profile = Profile(config.profile_steps, workdir)
  with (
    jax.set_mesh(mesh),
    checkpoint.manager(workdir, c.keep, c.keep_every, lambda: best.step) as saves,
    distributed.Preemption() as preemption,
  ):
    best = Best(c, best_checkpoint.read(saves))
    is_finished = (saves.latest_step() or 0) == c.steps or best.ended
    if not is_finished:
      feed.check_servers()
    inputs = prepare(
      step, config, stores, student, online, mesh=mesh, saves=saves, metadata=metadata
    )
    state, start = inputs.state, int(inputs.state.step)
    if is_finished:
      with trackers.Follower(config, workdir, start):
        return read_metrics(workdir)[-1] | best.summary(start)
    evaluation.announce(workdir)
    step_fn = jitted(step, state, mesh)
    schedule = SaveSchedule(c, start)
    feed.open(step, inputs, start, checkpoint.read_metadata(saves, start) if start else {})
    follower = trackers.Follower(config, workdir, c.steps)
    with Log(workdir, start, c.steps, began) as log, follower:
      saved = start

      def save(done: int) -> None:
        nonlocal saved
        log.flush()  # raises if the loss is not finite, before the state is saved
        checkpoint.save(saves, done, state, metadata | best.metadata | feed.metadata(done))
        saved = done
        log.saved()

      for n in range(start, c.steps):
        if feed.due(n):
          log.flush()  # on CPUs, two programs that communicate at a time can block each other
          try:
            feed.begin(n, state)
          except (Preempted, Unavailable):
            # A store that does not answer may stop one process alone, which then cannot save.
            if n > saved and distributed.all_arrive(f"stopped before step {n}"):
              save(n)
              checkpoint.wait(saves)
            raise
          log.saved()
        data = feed.next(n)
        profile.step(n)
        with jax.transfer_guard("disallow"):
          state, metrics = step_fn(state, data.batch, data.teachers, base=inputs.base)
        if data.teacher:
          metrics |= {f"loss/{data.teacher}": metrics["loss"]}
        log.step(n, metrics | data.metrics)  # blocks on the metrics of the previous step only
        done = n + 1
        stop = preemption.reached()
        if evaluation.due(done):
          with distributed.Preemption.deferred():
            log.flush(functools.partial(evaluation, state, inputs))
          best.see(done, log.last)
          if metric := config.optim.plateau_metric:
            state = state.replace(opt=optim.observe(state.opt, log.last[metric]))
        if schedule.due(done, log.flush) or stop or best.step == done or best.ended:
          save(done)
        if best.ended:
          break
        if stop and done < c.steps:
          checkpoint.wait(saves)
          raise distributed.Preemption.stop("train", f"step {done} of {c.steps} is saved")
      profile.stop()
      checkpoint.wait(saves)
    return log.last | best.summary(done)


def make_step(
  config: Config,
  stores: Stores,
  student: ModelSource | None = None,
  online: Mapping[str, ModelSource] | None = None,
) -> Step:
  """Returns the training step of a config.

  Args:
    config: The config of the run.
    stores: The stores it trains on.
    student: The model to train; None to open config.student.
    online: The online teachers, from `online_teachers`; None to open those that a feature loss
      names.
  """
  student = student or loading.open_source(config.student, config.seed)
  named = {fn.teacher for fn in config.losses.values() if isinstance(fn, FeatureLoss)}
  compared = dict((online_teachers(config) if named else {}) if online is None else online)
  if TEACHER in named and TEACHER not in compared:  # its features are recorded
    compared[TEACHER] = loading.open_source(config.teacher, config.seed)
  sizes = [store.manifest.vocab_size for store in stores]
  return Step(
    losses=config.losses,
    learning_rate=optim.learning_rate(config.optim, config.train.steps),
    optimizer=optim.optimizer(config.optim),
    student=dataclasses.replace(student.compute, training=True),
    teacher=loading.compute_config(config.teacher),
    chunk=config.train.chunk,
    longest=None if config.tasks else max(store.manifest.seq_len for store in stores),
    accumulate=config.optim.accumulate,
    vocab_size=sum(sizes) if config.tasks else teacher_manifest(stores).vocab_size,
    student_config=student.config,
    teacher_configs={name: compared[name].config for name in sorted(named)},
    recorded=recorded(config, stores),
    balance_every=config.optim.balance_every,
    trainable=student.trainable,
    first_classes=tuple(
      (name, store.class_range.start)
      for name, store in zip(config.tasks, stores, strict=False)
      if isinstance(store, RecordedTask) and store.class_range
    ),
  )


def jitted(step: Step, state: TrainState, mesh: Mesh) -> jax.stages.Wrapped:
  """Returns the jitted step: (state, batch, teachers, base=None) -> (state, metrics).

  Args:
    step: The step.
    state: The state, or its shapes with shardings. The new state has the same shardings.
    mesh: The mesh.
  """
  shardings = jax.tree.map(lambda x: x.sharding, state)
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))
