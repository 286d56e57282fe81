"""Initial and restored state of a training run, and its online teachers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
from jax.sharding import Mesh

from distill_jax.config import Config
from distill_jax.models import loading, runs
from distill_jax.models.loading import ModelSource
from distill_jax.nn import sharding
from distill_jax.records.student_rows import TEACHER
from distill_jax.training.aligned_store import AlignedStore
from distill_jax.training.outputs import OtherTokenizer, Teachers
from distill_jax.training.step import Step
from distill_jax.training.stores import Stores, device_batches, teacher_manifest
from distill_jax.training.train_state import TrainState
from distill_jax.types import JsonObject, Model, PyTree

if TYPE_CHECKING:
  import orbax.checkpoint as ocp


@dataclasses.dataclass(frozen=True)
class TrainInputs:
  """Arguments of the training step, except for the batch.

  Attributes:
    state: The training state.
    teachers: Models of the online teachers, by name.
    base: The frozen base model if low-rank adapters are trained; otherwise None.
  """

  state: TrainState
  teachers: Teachers
  base: Model | None = None


def online_teachers(config: Config) -> dict[str, ModelSource]:
  """Opens the online teachers; returns them by name."""
  options = {"teacher": config.teacher} if config.train.online else {}
  for name, source in config.teachers.items():
    options[name] = dataclasses.replace(config.teacher, source=source)
  return {name: loading.open_source(teacher, config.seed) for name, teacher in options.items()}


def prepare(
  step: Step,
  config: Config,
  stores: Stores,
  student: ModelSource,
  online: Mapping[str, ModelSource],
  *,
  mesh: Mesh,
  saves: ocp.CheckpointManager,
  metadata: JsonObject,
) -> TrainInputs:
  """Returns the inputs of the step, with the state of the last checkpoint or before step 0.

  Args:
    step: The training step.
    config: The config of the run.
    stores: The stores it trains on.
    student: The model to train.
    online: The online teachers, from `online_teachers`.
    mesh: The mesh.
    saves: The checkpoints of the run.
    metadata: Values that must equal those saved in the checkpoint.

  Raises:
    InputError: The checkpoint is damaged or does not fit this run.
  """
  keys = runs.keys(config.seed)
  loaded = {name: source.load(mesh, keys["teacher"]).model for name, source in online.items()}
  teachers = with_tables(loaded, config, stores, mesh)
  base = student.load(mesh, keys["student"]).model if step.trainable.has_base else None
  abstract = abstract_state(step, stores, student)
  shardings = sharding.shardings(abstract, mesh, step.student.rules)
  if saves.latest_step() is not None:
    from distill_jax.runtime import checkpoint  # imports orbax; preflight has no checkpoints

    placed = sharding.with_shardings(abstract, shardings)
    return TrainInputs(checkpoint.restore(saves, placed, metadata), teachers, base)
  trained = _start(student, base, mesh, keys)
  adapters = _adapters(step, stores, keys["adapters"])
  if any(fn.fits_adapters and name in adapters for name, fn in step.feature_losses.items()):
    batch = next(device_batches(config, stores, mesh))
    adapters |= jax.jit(step.fit)(trained, adapters, batch, teachers, base)
  init = jax.jit(step.init, out_shardings=shardings, donate_argnums=0)
  return TrainInputs(init(trained, adapters), teachers, base)


def with_tables(
  models: Mapping[str, Model], config: Config, stores: Stores, mesh: Mesh | None = None
) -> Teachers:
  """Returns online teachers with the tables of another tokenizer, where the stores need them.

  Args:
    models: The teachers by name.
    config: The config of the run.
    stores: The stores it trains on.
    mesh: The mesh whose devices hold the tables; None to keep them on the host.
  """
  store = stores[0]
  if not isinstance(store, AlignedStore):
    return models
  tables = store.rows.dense_tables if mesh is None else store.rows.on_devices(mesh)
  other = OtherTokenizer(models[TEACHER], tables, config.retarget.min_mass)
  return {**models, TEACHER: other}


def _start(
  student: ModelSource, base: Model | None, mesh: Mesh, keys: Mapping[str, jax.Array]
) -> PyTree:
  """Returns the initial trainable parameters; the rest of the loaded student is freed."""
  model = base if base is not None else student.load_initial(mesh, keys["student"]).model
  return student.start_training(model, mesh, keys)


def abstract_state(step: Step, stores: Stores, student: ModelSource) -> TrainState:
  """Returns the shapes and dtypes of the state before step 0, without allocating memory."""

  def init(trained: PyTree, key: jax.Array) -> TrainState:
    return step.init(trained, _adapters(step, stores, key))

  return jax.eval_shape(init, student.abstract_trainable, jax.eval_shape(jax.random.key, 0))


def _adapters(step: Step, stores: Stores, key: jax.Array) -> dict[str, PyTree]:
  """Returns the adapters of the losses, by the name of the loss."""
  taps = teacher_manifest(stores).taps if step.recorded.taps else None
  recorded_width = taps.width if taps else None
  adapters = {}
  for i, name in enumerate(step.losses):
    if fn := step.feature_losses.get(name):
      student_config, teacher_config = step.configs(fn)
      width = fn.adapter_width(teacher_config, recorded_width if fn.teacher == TEACHER else None)
      own_key = jax.random.fold_in(key, i)
      adapters[name] = fn.init(own_key, step.pairs(fn), student_config, width)
  return {name: owned for name, owned in adapters.items() if owned}
