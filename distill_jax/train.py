"""The only loop: stream batches through the step, log, save, resume."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from distill_jax import build, checkpoint, optim, sharding
from distill_jax.config import Config
from distill_jax.data import loader
from distill_jax.errors import InputError
from distill_jax.metrics import MetricsWriter
from distill_jax.progress import Progress
from distill_jax.records.store import Store, open_store
from distill_jax.schedules import constant
from distill_jax.step import Step
from distill_jax.types import Batch


def train(config: Config, workdir: Path) -> dict[str, Any]:
  """Trains the student to the last step, from the last checkpoint where there is one.

  Returns: the metrics of the last step.
  Raises:
    InputError: whatever in the config does not fit, before anything is compiled.
    FloatingPointError: a loss that is not finite; the last good checkpoint stays.
  """
  stores = open_stores(config)
  check(config, stores)
  mesh = sharding.make_mesh(**vars(config.mesh))
  c = config.train
  sharding.check_batch("train.batch_size", c.batch_size, mesh, config.optim.accumulate)
  with jax.set_mesh(mesh), checkpoint.manager(workdir, config.train.keep) as saves:
    step, state, teachers = prepare(config, mesh, saves)
    where = jax.tree.map(lambda x: x.sharding, state)
    step_fn = jax.jit(step, donate_argnums=0, out_shardings=(where, None))
    batches = loader.batches(
      stores, batch_size=c.batch_size, seed=config.seed, start=int(state.step),
      mixture=c.mixture, process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
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


def prepare(config: Config, mesh: Any, saves: Any) -> tuple[Step, Any, dict[str, Any]]:
  """(the step, the state to go on from, online teachers)."""
  keys = build.keys(config.seed)
  teachers = {}
  if config.train.online:
    teachers["teacher"] = build.build(config.teacher, mesh, keys["teacher"]).model
  step = make_step(config)
  like = jax.eval_shape(step.init, build.abstract(config.student))
  where = sharding.shardings(like, mesh, step.student.rules)
  if saves.latest_step() is not None:
    return step, checkpoint.restore(saves, build.place(like, where)), teachers
  model = build.build(config.student, mesh, keys["student"]).model
  return step, jax.jit(step.init, out_shardings=where, donate_argnums=0)(model), teachers


def make_step(config: Config) -> Step:
  """The step that a config describes."""
  return Step(
    losses=config.losses,
    learning_rate=optim.learning_rate(config.optim, config.train.steps),
    optimizer=optim.optimizer(config.optim),
    student=build.compute(config.student),
    teacher=build.compute(config.teacher),
    chunk=config.train.chunk,
    accumulate=config.optim.accumulate,
  )


def open_stores(config: Config) -> list[Store]:
  """The stores that a config trains on, each checked against its manifest."""
  if not config.train.records:
    raise InputError("train.records names no store; record one and give its folder")
  return [open_store(path) for path in config.train.records]


def check(config: Config, stores: list[Store]) -> None:
  """What can be known to be wrong before anything is read or compiled."""
  if not config.losses:
    raise InputError("losses is empty, so there is nothing to train on; add ce or kd")
  if all(v == 0 for fn in config.losses.values() for v in fn.weight.values):
    raise InputError("every weight in losses is 0, so nothing would be trained")
  if config.optim.accumulate < 1:
    raise InputError(f"optim.accumulate is {config.optim.accumulate}; it is at least 1")
  _, shape = build.shape(config.student)
  for path, store in zip(config.train.records, stores, strict=True):
    about = store.manifest
    if about.vocab_size > shape.vocab_size:
      raise InputError(
        f"records {path} are over {about.vocab_size} tokens and the student has "
        f"{shape.vocab_size} rows; record with the student's tokenizer"
      )
    if about.seq_len > shape.max_position_embeddings:
      raise InputError(
        f"records {path} hold sequences of {about.seq_len} tokens and the student reads at most "
        f"{shape.max_position_embeddings}; record with a smaller data.seq_len"
      )
    for name, fn in config.losses.items():
      if hasattr(fn, "teacher") and about.kind == "text" and not config.train.online:
        raise InputError(
          f"losses.{name} wants a teacher and records {path} hold text alone; record with "
          f"records.kind=sampled or set train.online=True"
        )
      temperatures = () if config.train.online else getattr(fn, "temperature", constant(1)).values
      if hasattr(fn, "temperature") and any(t != about.temperature for t in temperatures):
        raise InputError(
          f"losses.{name}.temperature is {temperatures} and records {path} were made at "
          f"{about.temperature}; record at that temperature"
        )
