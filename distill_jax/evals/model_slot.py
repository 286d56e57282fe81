"""A model in memory in one of two forms: stacked layers to score, unrolled layers to generate."""

from __future__ import annotations

import functools

import jax

from distill_jax.data import corpus
from distill_jax.data.options import DataOptions
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.generation import placement
from distill_jax.generation.options import DecodingOptions
from distill_jax.generation.unrolled import Unrolled
from distill_jax.models import loading, runs
from distill_jax.models.options import ModelOptions
from distill_jax.nn.layers import ComputeConfig


class ModelSlot:
  """A model that is opened and loaded at its first use.

  Only one form is in memory at a time, so a change of form may load the weights again.

  Args:
    options: The model. A model on a server is never opened.
    mesh: The devices.
    seed: The seed for random weights.
    is_teacher: True to initialise random weights as the teacher's, False as the student's.
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
    """Returns the tokenizer set in data.tokenizer, or the model's tokenizer."""
    return corpus.tokenizer_of(data, self.source.pretrained)

  def stacked(self) -> loading.LoadedModel:
    """Returns the model with stacked layers; loads it if necessary."""
    if self._stacked is None:
      self._unrolled = None
      key = runs.keys(self.seed)["teacher" if self.is_teacher else "student"]
      with jax.set_mesh(self.mesh):
        self._stacked = self.source.load(self.mesh, key)
    return self._stacked

  def hold(self, loaded: loading.LoadedModel) -> None:
    """Takes a model that is in memory, of which the slot may delete the arrays."""
    self._stacked, self._unrolled = loaded, None

  def release(self) -> None:
    """Frees the weights. They are loaded again at the next use."""
    self._stacked = self._unrolled = None

  def unrolled(self, decoding: DecodingOptions) -> tuple[Unrolled, ComputeConfig]:
    """Returns the model with unrolled layers, and its compute settings; loads it if necessary.

    The first call decides where the weights are; see placement.py.
    """
    if self._unrolled is None:
      loaded = self.stacked()
      self._stacked = None
      unrolled = placement.place(loaded.model, loaded.compute, self.mesh, decoding)
      self._unrolled = unrolled, loaded.compute
    return self._unrolled
