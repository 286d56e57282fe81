"""Training runs as sources of models."""

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
from distill_jax.runtime import distributed, json_io, storage
from distill_jax.types import Model, PyTree

if TYPE_CHECKING:
  from distill_jax.models.loading import ModelSource

RUN, BEST = "run:", "@best"
BASE = "base.json"  # in the folder of a run with adapters: name and digest of the base model


def keys(seed: int) -> dict[str, jax.Array]:
  """Returns a run's PRNG keys, one for each use."""
  names = ("student", "teacher", "records", "adapters", "lora", "generate")
  return dict(zip(names, jax.random.split(jax.random.key(seed), len(names)), strict=True))


def run_folder(source: str) -> Path:
  """Returns the local folder for a source "run:WORKDIR" or "run:WORKDIR@best"."""
  return storage.run_folder(source.removeprefix(RUN).removesuffix(BEST))


@dataclasses.dataclass(frozen=True)
class Run:
  """A training run.

  Attributes:
    folder: the folder of the run.
    config: its config.
    student: the student before training.
    step: the step of the checkpoint to read; None for the last one.
  """

  folder: Path
  config: Config
  student: ModelSource
  step: int | None = None

  @functools.cached_property
  def digest(self) -> str:
    """SHA-256, in hex, of the checkpoint; for adapters, also of their base model."""
    from distill_jax.runtime import checkpoint  # imports orbax, which other sources do not need

    trained = checkpoint.digest(self.folder, self.step)
    if not self.student.trainable.has_base:
      return trained
    return hashlib.sha256((trained + self.student.digest).encode()).hexdigest()

  def restore(self, mesh: Mesh) -> PyTree:
    """Returns the trained parameters: a model, shared layers, or adapters."""
    from distill_jax.runtime import checkpoint

    abstract = self.student.abstract_trainable
    shardings = sharding.shardings(abstract, mesh, self.student.compute.rules)
    return checkpoint.restore_params(
      self.folder, sharding.with_shardings(abstract, shardings), self.step
    )

  def load(self, mesh: Mesh, compute: ComputeConfig) -> Model:
    """Returns the trained model in its family's ordinary form.

    Adapters are merged into the base, shared layers are copied, and weights that were trained as
    integers are rounded.

    Args:
      mesh: the mesh.
      compute: the settings of the computation.

    Raises:
      InputError: adapters were trained on another base model.
    """
    trainable, trained, base = self.student.trainable, self.restore(mesh), None
    if trainable.has_base:
      self.check_base()
      base = self.student.load(mesh, keys(self.config.seed)["student"]).model
    return trainable.merge(trained, base, mesh, compute)

  def pin_base(self) -> None:
    """Writes the identity of the adapters' base model on the first call, and checks it later.

    All processes must call it.

    Raises:
      InputError: the base model is not the one in the file.
    """
    distributed.run_on_process_0(self._pin_base)
    storage.share(self.folder / BASE)

  def _pin_base(self) -> None:
    if not (self.folder / BASE).exists():
      json_io.write_json(self.folder / BASE, self.student.identity)
    self.check_base()

  def check_base(self) -> None:
    """Checks that the base model is the one that the adapters were trained on.

    Raises:
      InputError: it is another model, or the file with its identity is missing.
    """
    file = self.folder / BASE
    if not file.exists():
      raise InputError(
        f"{self.folder} lacks {BASE}, which names the base model of its adapters. Restore the file "
        "or train in another --workdir."
      )
    pinned = json_io.read_object(file, "restore the file, or train in another --workdir")
    found = self.student.identity
    if pinned["digest"] != found["digest"]:
      raise InputError(
        f"The adapters in {self.folder} were trained on {pinned['name']} with digest "
        f"{pinned['digest']}, but its digest is now {found['digest']}. Restore the weights, or "
        "train in another --workdir."
      )
