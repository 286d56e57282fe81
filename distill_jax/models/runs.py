"""What a training run has made, as the source of a model."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import jax
from jax.sharding import Mesh

from distill_jax.config import Config
from distill_jax.errors import InputError
from distill_jax.nn import sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.runtime import checkpoint, json_io, storage
from distill_jax.types import Model, PyTree

if TYPE_CHECKING:
  from distill_jax.models.loading import ModelSource

RUN = "run:"
BASE = "base.json"  # in the folder of a run of adapters: name and digest of their base model


def keys(seed: int) -> dict[str, jax.Array]:
  """Returns the random keys that a run begins with, one for each use."""
  names = ("student", "teacher", "records", "adapters", "lora", "generate")
  return dict(zip(names, jax.random.split(jax.random.key(seed), len(names)), strict=True))


def run_folder(source: str) -> Path:
  """Returns the folder, on this machine, of the run that "run:WORKDIR" names."""
  return storage.local(source.removeprefix(RUN))


@dataclasses.dataclass(frozen=True)
class Run:
  """A training run: its folder, its config, and the student that it started from."""

  folder: Path
  config: Config
  student: ModelSource

  @functools.cached_property
  def digest(self) -> str:
    """sha256, in hex, of what the last checkpoint holds; of adapters, with their base model."""
    trained = checkpoint.digest(self.folder)
    if not self.student.trainable.has_base:
      return trained
    return hashlib.sha256((trained + self.student.digest).encode()).hexdigest()

  def restore(self, mesh: Mesh, step: int | None = None) -> PyTree:
    """Returns what was trained: a whole model, shared layers, or adapters alone.

    Args:
      step: of the checkpoint; None is the last one.
    """
    abstract = self.student.abstract_trainable
    shardings = sharding.shardings(abstract, mesh, self.student.compute.rules)
    return checkpoint.restore_params(
      self.folder, sharding.with_shardings(abstract, shardings), step
    )

  def load(self, mesh: Mesh, compute: ComputeConfig, step: int | None = None) -> Model:
    """Returns the trained model in its ordinary form.

    Adapters are merged into their base, shared layers are written out, and weights that were
    trained as integers are rounded to their grids.
    """
    trainable, trained, base = self.student.trainable, self.restore(mesh, step), None
    if trainable.has_base:
      self.check_base()
      base = self.student.load(mesh, keys(self.config.seed)["student"]).model
    return trainable.merge(trained, base, mesh, compute)

  def pin_base(self) -> None:
    """Writes down, once, which base model the adapters are trained on; refuses another one."""
    if not (self.folder / BASE).exists():
      json_io.write_json(self.folder / BASE, self.student.identity)
    self.check_base()

  def check_base(self) -> None:
    """Raises InputError if the base model is not the one that the adapters were trained on."""
    file = self.folder / BASE
    if not file.exists():
      raise InputError(
        f"{self.folder} holds adapters and no {BASE}, which names their base; train there"
      )
    pinned = json_io.read_object(file, "bring the file back, or train in another --workdir")
    found = self.student.identity
    if pinned["digest"] != found["digest"]:
      raise InputError(
        f"the adapters in {self.folder} were trained on {pinned['name']} with digest "
        f"{pinned['digest']} and it now has {found['digest']}; bring the old weights back or "
        "train in another --workdir"
      )
