"""The body of a model under the names that it has beneath a head.

transformers saves a BertModel as "encoder.layer.0…" and the same body in a classifier as
"bert.encoder.layer.0…"; a family declares the second. And transformers 5 saves a LLaVA's
"vision_tower.encoder…" where older ones, and vLLM, have "vision_tower.vision_model.encoder…".
"""

from __future__ import annotations

import pathlib

import numpy as np

from distill_jax.hub.weights import Index, Weights


def prefixed(weights: Weights, prefix: str, after: str = "") -> Weights:
  """The weights, `prefix` in their names where none of them has it.

  It stands first, or, of names that begin with `after`, behind that.
  """
  if not prefix or any(name.startswith(after + prefix) for name in weights.names()):
    return weights
  return Prefixed(weights, prefix, after)


class Prefixed:
  """Weights whose names have something before them, or after their first part."""

  def __init__(self, weights: Weights, prefix: str, after: str = ""):
    self.files: tuple[pathlib.Path, ...] = weights.files
    self._weights, self._from, self._to = weights, after, after + prefix

  def _theirs(self, name: str) -> str:
    return self._from + name.removeprefix(self._to) if name.startswith(self._to) else name

  def names(self) -> set[str]:
    return {
      self._to + name.removeprefix(self._from) if name.startswith(self._from) else name
      for name in self._weights.names()
    }

  def shape(self, name: str) -> tuple[int, ...]:
    return self._weights.shape(self._theirs(name))

  def dtype(self, name: str) -> np.dtype:
    return self._weights.dtype(self._theirs(name))

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    return self._weights.read(self._theirs(name), index)
