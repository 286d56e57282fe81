"""A model in memory in one of two forms: stacked layers read texts, unrolled ones generate."""

from __future__ import annotations

import functools

import jax

from distill_jax.generation.unrolled import Unrolled, unroll
from distill_jax.models.loading import LoadedModel, ModelSource, open_source
from distill_jax.models.options import ModelOptions
from distill_jax.nn.layers import ComputeConfig


class ModelSlot:
  """A model that is loaded when it is used.

  There is memory for one form, so a change of form loads the weights again.
  """

  def __init__(self, spec: ModelOptions, mesh: jax.sharding.Mesh, key: jax.Array):
    self.spec, self.mesh, self._key = spec, mesh, key
    self._stacked: LoadedModel | None = None
    self._unrolled: tuple[Unrolled, ComputeConfig] | None = None

  @functools.cached_property
  def source(self) -> ModelSource:
    """The model, opened when it is first asked for: a server's is never opened."""
    return open_source(self.spec)

  def stacked(self) -> LoadedModel:
    """The model with stacked layers, as it was loaded."""
    if self._stacked is None:
      self._unrolled = None
      with jax.set_mesh(self.mesh):
        self._stacked = self.source.load(self.mesh, self._key)
    return self._stacked

  def unrolled(self) -> tuple[Unrolled, ComputeConfig]:
    """The model with its layers one by one, and how it is computed."""
    if self._unrolled is None:
      loaded = self.stacked()
      self._stacked = None
      self._unrolled = unroll(loaded.model, loaded.compute), loaded.compute
    return self._unrolled
