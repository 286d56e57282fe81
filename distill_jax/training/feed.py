"""Feeds: the sources of the batches of a training run; by default, the stores of its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from jax.sharding import Mesh

from distill_jax.config import Config
from distill_jax.models.loading import ModelSource
from distill_jax.training import stores
from distill_jax.training.outputs import Teachers
from distill_jax.training.state import TrainInputs, online_teachers
from distill_jax.training.step import Step
from distill_jax.training.stores import Stores
from distill_jax.training.train_state import TrainState
from distill_jax.types import Batch, JsonObject


class StepData(NamedTuple):
  """The data of a step.

  Attributes:
    batch: The global batch, on the devices.
    teachers: The online teachers, by name.
    metrics: Further metrics of the step.
    teacher: The name of the teacher of its texts, if steps have different ones; "" otherwise.
  """

  batch: Batch
  teachers: Teachers
  metrics: Mapping[str, float] = {}
  teacher: str = ""


class Feed(Protocol):
  """The source of a run's batches: functions of the config, the step and the state before it.

  Attributes:
    config: The config of the run, in which train.records names `stores`.
    stores: The stores that it trains on; of stores that are made during the run, their manifests.
    online: The teachers that run in the step, by their names in a batch.
  """

  config: Config
  stores: Stores
  online: Mapping[str, ModelSource]

  def check_servers(self) -> None:
    """Checks the servers of the batches, before weights are read; not of a finished run.

    Raises:
      InputError: The servers do not fit the run.
      Unavailable: No server answers.
    """

  def open(self, step: Step, inputs: TrainInputs, start: int, saved: JsonObject) -> None:
    """Prepares the batches from a step on.

    Args:
      step: The training step.
      inputs: The arguments of the step.
      start: The first step.
      saved: The metadata of the checkpoint of that step; {} without one.
    """

  def due(self, step: int) -> bool:
    """Returns whether `begin` is to be called before this step."""

  def begin(self, step: int, state: TrainState) -> None:
    """Prepares the next batches with the state before a step, while no device computes.

    Raises:
      Preempted: SIGTERM was received. What is finished is kept.
      Unavailable: No server answers. What is finished is kept.
    """

  def next(self, step: int) -> StepData:
    """Returns the batch of a step. Steps are in order, without gaps."""

  def metadata(self, step: int) -> JsonObject:
    """Returns what `open` needs from the metadata of a checkpoint before this step."""


class StoredFeed:
  """The batches of the stores in train.records, or of a task's data; a `Feed`.

  Args:
    config: The config of the run.
    student: The model to train.
    mesh: The mesh.
  """

  def __init__(self, config: Config, student: ModelSource, mesh: Mesh):
    self.config, self._mesh = config, mesh
    self.stores: Stores = stores.open_stores(config, student)
    self.online: Mapping[str, ModelSource] = online_teachers(config)

  def check_servers(self) -> None:
    """Does nothing: no server has batches."""

  def open(self, step: Step, inputs: TrainInputs, start: int, saved: JsonObject) -> None:
    """Starts to read batches; see `Feed.open`."""
    del step, saved
    self._teachers = inputs.teachers
    self._batches = stores.device_batches(self.config, self.stores, self._mesh, start)

  def due(self, step: int) -> bool:
    """Returns False: records are there already."""
    del step
    return False

  def begin(self, step: int, state: TrainState) -> None:
    """Does nothing."""

  def next(self, step: int) -> StepData:
    """Returns the batch of a step; see `Feed.next`."""
    del step
    return StepData(next(self._batches), self._teachers)

  def metadata(self, step: int) -> JsonObject:
    """Returns {}: the position in the stores is the number of the step."""
    del step
    return {}
