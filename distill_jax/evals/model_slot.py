"""A model in memory in one of two forms: whole, which reads texts, or unrolled, which writes."""

from __future__ import annotations

from typing import Any

import jax

from distill_jax.generation.unrolled import Unrolled, unroll
from distill_jax.models import loading
from distill_jax.models.options import ModelOptions
from distill_jax.nn.layers import ComputeConfig


class ModelSlot:
  """Made when it is asked for. There is memory for one form, so a change of form loads again."""

  def __init__(self, spec: ModelOptions, mesh: jax.sharding.Mesh, key: jax.Array):
    self.spec, self.mesh, self._key = spec, mesh, key
    self._whole: loading.LoadedModel | None = None
    self._apart: tuple[Unrolled, ComputeConfig] | None = None

  def whole(self) -> loading.LoadedModel:
    if self._whole is None:
      self._apart = None
      self._whole = self._build()
    return self._whole

  def apart(self) -> tuple[Unrolled, ComputeConfig]:
    if self._apart is None:
      built: Any = self.whole()
      self._whole = None
      self._apart = unroll(built.model, built.compute), built.compute
    return self._apart

  def _build(self) -> loading.LoadedModel:
    with jax.set_mesh(self.mesh):
      return loading.build(self.spec, self.mesh, self._key)
