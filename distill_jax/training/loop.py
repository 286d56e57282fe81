"""The only loop: stream batches through the step, log, save, resume."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from distill_jax.config import Config
from distill_jax.errors import InputError
from distill_jax.models import loading
from distill_jax.models.options import ModelOptions
from distill_jax.nn import lora, sharding
from distill_jax.records import collate
from distill_jax.records.multi_teacher import MultiTeacherStore
from distill_jax.records.store import Manifest, open_store
from distill_jax.runtime import checkpoint, distributed, storage
from distill_jax.tasks import dataset
from distill_jax.training import loader, optim, validate
from distill_jax.training.metric_writer import read_metrics
from distill_jax.training.run_log import Log, Profile
from distill_jax.training.step import Step
from distill_jax.types import Batch, Recorded, TrainState

Stores = Sequence[Any]  # of records.joined.Joined, or of tasked.Tasked


def train(config: Config, workdir: Path) -> dict[str, Any]:
  """Trains the student to the last step, from the last checkpoint where there is one.

  Returns: the metrics of the last step.
  Raises:
    InputError: whatever in the config does not fit, before anything is compiled.
    FloatingPointError: a loss that is not finite; the last good checkpoint stays.
    Preempted: SIGTERM came; the step it came in is saved.
  """
  began = time.monotonic()
  stores = open_stores(config)
  validate.check_run(config, stores)
  mesh = sharding.make_mesh(**vars(config.mesh))
  c = config.train
  sharding.check_batch("train.batch_size", c.batch_size, mesh, config.optim.accumulate)
  step = make_step(config, stores)
  validate.check_features(config, step, stores)
  if config.student.lora.rank:
    distributed.run_on_process_0(lambda: loading.pin_base(workdir, config))
  about = {"records": [digest for store in stores for digest in store.digests]}
  profile = Profile(config.profile_steps, workdir)
  with (
    jax.set_mesh(mesh),
    checkpoint.manager(workdir, c.keep, c.keep_every) as saves,
    distributed.Preemption() as preemption,
  ):
    state, *frozen = prepare(config, mesh, saves, step, stores, about)
    start, where = int(state.step), jax.tree.map(lambda x: x.sharding, state)
    if start == c.steps:
      return read_metrics(workdir)[-1]  # finished before
    step_fn = jitted(step, where, mesh)
    batches, rows = _batches(config, stores, start), sharding.batch_sharding(mesh)
    with Log(workdir, start, c.steps, began) as log:
      for n in range(start, c.steps):
        batch = collate.to_device(next(batches), rows)
        profile.step(n)
        with jax.transfer_guard("disallow"):
          state, metrics = step_fn(state, batch, *frozen)
        log.step(n, metrics)  # and reads those of the step before: one step is in flight
        stop = preemption.reached(n + 1)
        if stop or (n + 1) % c.checkpoint_every == 0 or n + 1 == c.steps:
          log.flush()  # a state is saved once its loss is known to be finite
          checkpoint.save(saves, n + 1, state, about)
          log.saved()
        if stop and n + 1 < c.steps:
          checkpoint.wait(saves)
          raise distributed.Preemption.stop("train", f"step {n + 1} of {c.steps} is saved")
      profile.stop()
      checkpoint.wait(saves)
    return log.last


def prepare(
  config: Config, mesh: Any, saves: Any, step: Step, stores: Stores, about: dict[str, Any]
) -> tuple[Any, ...]:
  """(the state to go on from, online teachers); and the base, where its adapters are trained."""
  keys = loading.keys(config.seed)
  teachers = {}
  for name, spec in online(config).items():
    teachers[name] = loading.build(spec, mesh, keys["teacher"]).model
  adapters = lambda: _adapters(step, stores, keys["adapters"])
  like = abstract_state(config, step, stores)
  where = sharding.shardings(like, mesh, step.student.rules)
  student, frozen = config.student, [teachers]
  if student.lora.rank:
    frozen.append(loading.build(student, mesh, keys["student"]).model)
  if saves.latest_step() is not None:
    return checkpoint.restore(saves, loading.place(like, where), about), *frozen
  if student.lora.rank:
    start = functools.partial(lora.init, loading.abstract(student), student.lora)
    model = jax.jit(start, out_shardings=where.params)(keys["lora"])
  elif student.share.layers:
    model = loading.build_shared(student, mesh, keys["student"]).model
  else:
    model = loading.build(student, mesh, keys["student"]).model
  fitted = _fit(config, step, stores, model, frozen, adapters(), mesh)
  return jax.jit(step.init, out_shardings=where, donate_argnums=0)(model, fitted), *frozen


def abstract_state(config: Config, step: Step, stores: Stores) -> TrainState:
  """The state before step 0 as shapes, in no memory."""
  key = jax.eval_shape(jax.random.key, 0)
  start = lambda model, key: step.init(model, _adapters(step, stores, key))
  return jax.eval_shape(start, loading.abstract_trainable(config.student), key)


def jitted(step: Step, where: Any, mesh: Any) -> Any:
  """The step as it is compiled: (state, batch, teachers[, base]) -> (state, metrics)."""
  return jax.jit(step, donate_argnums=0, out_shardings=(where, sharding.replicated(mesh)))


def _adapters(step: Step, stores: Stores, key: jax.Array) -> dict[str, Any]:
  """The parameters that losses own, by loss."""
  recorded = taught(stores).taps if step.recorded.taps else None
  width = recorded.width if recorded else getattr(step.teacher_config, "hidden_size", 0)
  of = lambda fn: fn.width(step.teacher_config) if hasattr(fn, "width") else width
  adapters = {
    name: fn.init(jax.random.fold_in(key, i), step.pairs(fn), step.student_config, of(fn))
    for i, (name, fn) in enumerate(step.losses.items())
    if hasattr(fn, "init")
  }
  return {name: made for name, made in adapters.items() if made}


def _fit(
  config: Config,
  step: Step,
  stores: Stores,
  model: Any,
  frozen: list[Any],
  adapters: Any,
  mesh: Any,
) -> dict[str, Any]:
  """Adapters that start as the least-squares fit on the first batch."""
  asked = [n for n in adapters if getattr(step.losses[n], "projection", "") == "least_squares"]
  if not asked:
    return adapters
  batch = collate.to_device(next(_batches(config, stores, 0)), sharding.batch_sharding(mesh))
  return adapters | jax.jit(lambda *args: step.fit(asked, *args))(model, adapters, batch, *frozen)


def online(config: Config) -> dict[str, ModelOptions]:
  """The teachers that run in the step, by name."""
  more = {n: dataclasses.replace(config.teacher, source=s) for n, s in config.teachers.items()}
  return ({"teacher": config.teacher} if config.train.online else {}) | more


def make_step(config: Config, stores: Stores) -> Step:
  """The step that a config describes, on these stores."""
  about = taught(stores)
  online = config.train.online
  taps = about.taps if not online else None
  whole = any(hasattr(fn, "whole") for fn in config.losses.values())
  return Step(
    losses=config.losses,
    learning_rate=optim.learning_rate(config.optim, config.train.steps),
    optimizer=optim.optimizer(config.optim, config.student.frozen),
    student=dataclasses.replace(loading.compute_config(config.student), training=True),
    teacher=loading.compute_config(config.teacher),
    chunk=config.train.chunk,
    accumulate=config.optim.accumulate,
    vocab_size=sum(s.manifest.vocab_size for s in stores) if config.tasks else about.vocab_size,
    student_config=loading.family_and_config(config.student)[1],
    teacher_config=loading.family_and_config(config.teacher)[1] if whole else None,
    recorded=Recorded(
      temperature=about.temperature,
      missing_mass=about.missing_mass,
      taps=taps.layers if taps else (),
      taps_of=taps.of if taps else "hidden",
    ),
    balance_every=config.optim.balance_every,
    frozen=config.student.frozen,
    parts=tuple((n, s.part.start) for n, s in zip(config.tasks, stores, strict=False) if s.part),
  )


def _batches(config: Config, stores: Stores, start: int) -> Iterator[Batch]:
  c = config.train
  return loader.batches(
    stores,
    batch_size=c.batch_size,
    seed=config.seed,
    start=start,
    mixture=c.mixture,
    targets=not c.online,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    read=dataset.reader(config),
  )


def taught(stores: Stores) -> Manifest:
  """Of the first store that holds a teacher's targets; of the first, if none does."""
  manifests = [store.manifest for store in stores]
  return next((m for m in manifests if m.kind != "text"), manifests[0])


def open_stores(config: Config) -> Stores:
  """The stores that a config trains on, those of all teachers joined, each checked.

  A task brings its own data, and needs records only of what a teacher has said.
  """
  if not config.tasks:
    return _recorded(config)
  rows = open_tasks(config)
  said = _recorded(config) if config.train.records else []
  if said and len(said) != len(rows):
    raise InputError(
      f"train.records names {len(said)} stores and there are {len(rows)} tasks; name one for each, "
      "in their order, or none"
    )
  parts = dataset.parts(rows)
  stores = []
  for i, (name, of) in enumerate(rows.items()):
    records = said[i] if said else None
    manifest = records.manifest if records else of.manifest
    stores.append(dataset.RecordedTask(of, records, manifest, parts[name]))
  return stores


def open_tasks(config: Config) -> dict[str, dataset.Rows]:
  """What the student reads of each task, checked."""
  pretrained = loading.pretrained(config.student)
  rows = {name: dataset.open_rows(config, name, "train", pretrained) for name in config.tasks}
  dataset.check(rows, loading.family_and_config(config.student)[1])
  return rows


def _recorded(config: Config) -> Stores:
  if not config.train.records:
    raise InputError("train.records names no store; record one and give its folder")
  stores = [open_store(storage.local(path)) for path in config.train.records]
  for name, paths in config.train.teachers.items():
    if len(paths) != len(stores):
      raise InputError(
        f"train.teachers.{name} names {len(paths)} stores and train.records {len(stores)}; name "
        "one of the same text for each"
      )
  more = {n: [open_store(storage.local(p)) for p in ps] for n, ps in config.train.teachers.items()}
  return [
    MultiTeacherStore(store, {n: of[i] for n, of in more.items()}) for i, store in enumerate(stores)
  ]
