"""A model in memory in one of two forms: stacked layers read texts, unrolled ones generate."""

from __future__ import annotations

import functools

import jax

from distill_jax.data import corpus
from distill_jax.data.options import DataOptions
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.generation.unrolled import Unrolled, unroll
from distill_jax.models import loading, runs
from distill_jax.models.options import ModelOptions
from distill_jax.nn.layers import ComputeConfig


class ModelSlot:
  """A model that is opened and loaded when it is used.

  There is memory for one form, so a change of form loads the weights again.

  Args:
    options: the model; one that is served is never opened.
    is_teacher: decides which of the seed's keys initialises random weights.
  """

  def __init__(
    self, options: ModelOptions, mesh: jax.sharding.Mesh, seed: int, is_teacher: bool = False
  ):
    self.options, self.mesh, self.seed, self.is_teacher = options, mesh, seed, is_teacher
    self._stacked: loading.LoadedModel | None = None
    self._unrolled: tuple[Unrolled, ComputeConfig] | None = None

  @functools.cached_property
  def source(self) -> loading.ModelSource:
    """The model without its weights."""
    return loading.open_source(self.options, self.seed)

  def tokenizer(self, data: DataOptions) -> Tokenizer:
    """The tokenizer that `data` names, or the model's own."""
    return corpus.tokenizer_of(data, self.source.pretrained)

  def stacked(self) -> loading.LoadedModel:
    """The model with stacked layers, as it was loaded."""
    if self._stacked is None:
      self._unrolled = None
      key = runs.keys(self.seed)["teacher" if self.is_teacher else "student"]
      with jax.set_mesh(self.mesh):
        self._stacked = self.source.load(self.mesh, key)
    return self._stacked

  def release(self) -> None:
    """Frees the weights; they are loaded again when they are used."""
    self._stacked = self._unrolled = None

  def unrolled(self) -> tuple[Unrolled, ComputeConfig]:
    """The model with its layers one by one, and how it is computed."""
    if self._unrolled is None:
      loaded = self.stacked()
      self._stacked = None
      self._unrolled = unroll(loaded.model, loaded.compute), loaded.compute
    return self._unrolled
