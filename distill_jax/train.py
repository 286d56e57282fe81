"""The only loop: stream batches through the step, log, save, resume."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from distill_jax import build, checkpoint, checks, optim, sharding
from distill_jax.config import Config
from distill_jax.data import loader
from distill_jax.errors import InputError
from distill_jax.metrics import MetricsWriter, read_metrics
from distill_jax.progress import Progress
from distill_jax.records.store import Store, open_store
from distill_jax.step import Step
from distill_jax.types import Batch, Recorded


def train(config: Config, workdir: Path) -> dict[str, Any]:
  """Trains the student to the last step, from the last checkpoint where there is one.

  Returns: the metrics of the last step.
  Raises:
    InputError: whatever in the config does not fit, before anything is compiled.
    FloatingPointError: a loss that is not finite; the last good checkpoint stays.
  """
  stores = open_stores(config)
  checks.check_run(config, stores)
  mesh = sharding.make_mesh(**vars(config.mesh))
  c = config.train
  sharding.check_batch("train.batch_size", c.batch_size, mesh, config.optim.accumulate)
  step = make_step(config, stores)
  checks.check_features(config, step, stores)
  with jax.set_mesh(mesh), checkpoint.manager(workdir, config.train.keep) as saves:
    state, teachers = prepare(config, mesh, saves, step, stores)
    where = jax.tree.map(lambda x: x.sharding, state)
    step_fn = jax.jit(step, donate_argnums=0, out_shardings=(where, None))
    if int(state.step) == config.train.steps:
      return read_metrics(workdir)[-1]  # finished before
    batches = _batches(config, stores, int(state.step))
    return _loop(config, workdir, step_fn, state, teachers, batches, saves, mesh)


def _loop(
  config: Config, workdir: Path, step_fn: Any, state: Any, teachers: Any,
  batches: Iterator[Batch], saves: Any, mesh: Any,
) -> dict[str, Any]:  # fmt: skip
  """One step is kept in flight: a step's metrics are read once the next is dispatched."""
  start, steps, where = int(state.step), config.train.steps, sharding.batch_sharding(mesh)
  last: dict[str, float] = {}
  with (
    MetricsWriter(workdir, purge_step=start) as writer,
    Progress("train", steps, "steps", start=start) as progress,
  ):

    def report(n: int, metrics: dict[str, jax.Array]) -> dict[str, float]:
      row = {name: float(x) for name, x in jax.device_get(metrics).items()}
      if not math.isfinite(row["loss"]):
        raise FloatingPointError(
          f"the loss of step {n} is {row['loss']}; the last good checkpoint is "
          f"{saves.latest_step()} in {saves.directory}; lower optim.peak_lr or look at its data"
        )
      writer.write(n, row)
      progress.add(1, loss=row["loss"])
      return row

    pending: tuple[int, dict[str, jax.Array]] | None = None
    for n in range(start, steps):
      batch = loader.to_device(next(batches), where)
      with jax.transfer_guard("disallow"):
        state, metrics = step_fn(state, batch, teachers)
      if pending is not None:
        last = report(*pending)
      pending = (n, metrics)
      if (n + 1) % config.train.checkpoint_every == 0 or n + 1 == steps:
        last, pending = report(*pending), None  # a state is saved once its loss is known finite
        checkpoint.save(saves, n + 1, state)
    saves.wait_until_finished()
  return last


def prepare(
  config: Config, mesh: Any, saves: Any, step: Step, stores: list[Store]
) -> tuple[Any, dict[str, Any]]:
  """(the state to go on from, online teachers)."""
  keys = build.keys(config.seed)
  teachers = {}
  if config.train.online:
    teachers["teacher"] = build.build(config.teacher, mesh, keys["teacher"]).model
  adapters = lambda: _adapters(step, stores, keys["adapters"])
  like = jax.eval_shape(lambda model: step.init(model, adapters()), build.abstract(config.student))
  where = sharding.shardings(like, mesh, step.student.rules)
  if saves.latest_step() is not None:
    return checkpoint.restore(saves, build.place(like, where)), teachers
  model = build.build(config.student, mesh, keys["student"]).model
  fitted = _fit(config, step, stores, model, teachers, adapters(), mesh)
  return jax.jit(step.init, out_shardings=where, donate_argnums=0)(model, fitted), teachers


def _adapters(step: Step, stores: list[Store], key: jax.Array) -> dict[str, Any]:
  """The parameters that losses own, by loss."""
  recorded = stores[0].manifest.taps if step.recorded.taps else None
  width = recorded.width if recorded else getattr(step.teacher_config, "hidden_size", 0)
  adapters = {
    name: fn.init(jax.random.fold_in(key, i), step.pairs(fn), step.student_config, width)
    for i, (name, fn) in enumerate(step.losses.items())
    if hasattr(fn, "init")
  }
  return {name: made for name, made in adapters.items() if made}


def _fit(
  config: Config, step: Step, stores: list[Store], model: Any, teachers: Any, adapters: Any,
  mesh: Any,
) -> dict[str, Any]:  # fmt: skip
  """Adapters that start as the least-squares fit on the first batch."""
  asked = [n for n in adapters if getattr(step.losses[n], "projection", "") == "least_squares"]
  if not asked:
    return adapters
  batch = loader.to_device(next(_batches(config, stores, 0)), sharding.batch_sharding(mesh))
  return adapters | jax.jit(lambda *args: step.fit(asked, *args))(model, adapters, batch, teachers)


def make_step(config: Config, stores: list[Store]) -> Step:
  """The step that a config describes, on these stores."""
  about = stores[0].manifest
  online = config.train.online
  taps = about.taps if not online else None
  whole = any(hasattr(fn, "whole") for fn in config.losses.values())
  return Step(
    losses=config.losses,
    learning_rate=optim.learning_rate(config.optim, config.train.steps),
    optimizer=optim.optimizer(config.optim),
    student=build.compute(config.student),
    teacher=build.compute(config.teacher),
    chunk=config.train.chunk,
    accumulate=config.optim.accumulate,
    vocab_size=about.vocab_size,
    student_config=build.shape(config.student)[1],
    teacher_config=build.shape(config.teacher)[1] if whole else None,
    recorded=Recorded(
      temperature=about.temperature,
      missing_mass=about.missing_mass,
      taps=taps.layers if taps else (),
      taps_of=taps.of if taps else "hidden",
    ),
    balance_every=config.optim.balance_every,
  )


def _batches(config: Config, stores: list[Store], start: int) -> Iterator[Batch]:
  c = config.train
  return loader.batches(
    stores, batch_size=c.batch_size, seed=config.seed, start=start, mixture=c.mixture,
    targets=not c.online, process_index=jax.process_index(), process_count=jax.process_count(),
  )  # fmt: skip


def open_stores(config: Config) -> list[Store]:
  """The stores that a config trains on, each checked against its manifest."""
  if not config.train.records:
    raise InputError("train.records names no store; record one and give its folder")
  return [open_store(path) for path in config.train.records]
