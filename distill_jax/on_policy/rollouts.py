"""The texts of a round, which the student samples and which are stored by teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from distill_jax.config import Config
from distill_jax.models.loading import LoadedModel, ModelSource
from distill_jax.on_policy.plan import Plan
from distill_jax.records.store import Store

FOLDER = "rounds"  # in the folder of a run


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

  def check(self) -> None:
    """Checks everything that can be checked before weights are read. All processes call it.

    Raises:
      InputError: The config, the student and the prompts do not fit together.
    """
    raise NotImplementedError

  def generate(
    self, number: int, fingerprint: str, model: Callable[[], LoadedModel]
  ) -> dict[str, Store]:
    """Returns the store of each teacher's texts in a round; texts that are missing are sampled.

    Args:
      number: The number of the round.
      fingerprint: The fingerprint of the student's weights. Texts of other weights are deleted.
      model: Returns the student, whose arrays may be deleted. Called if texts are missing.

    Raises:
      InputError: Too many texts were cut off or are repetitions.
      Preempted: SIGTERM was received. Finished shards are kept.
    """
    raise NotImplementedError


def folder_of(folder: Path, number: int, teacher: str = "") -> Path:
  """Returns the folder of a round in the folder of a run, or that of a teacher's stores in it."""
  return folder / FOLDER / f"{number:05d}" / teacher
