"""The body of a model under the names that it has beneath a head.

transformers saves a BertModel as "encoder.layer.0…" and the same body in a classifier as
"bert.encoder.layer.0…"; a family declares the second.
"""

from __future__ import annotations

import pathlib

import numpy as np

from distill_jax.hub.weights import Index, Weights


def prefixed(weights: Weights, prefix: str) -> Weights:
  """The weights, `prefix` before their names where none of them has it."""
  if not prefix or any(name.startswith(prefix) for name in weights.names()):
    return weights
  return Prefixed(weights, prefix)


class Prefixed:
  """Weights whose names have something before them."""

  def __init__(self, weights: Weights, prefix: str):
    self.files: tuple[pathlib.Path, ...] = weights.files
    self._weights, self._prefix = weights, prefix

  def names(self) -> set[str]:
    return {self._prefix + name for name in self._weights.names()}

  def shape(self, name: str) -> tuple[int, ...]:
    return self._weights.shape(name.removeprefix(self._prefix))

  def dtype(self, name: str) -> np.dtype:
    return self._weights.dtype(name.removeprefix(self._prefix))

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    return self._weights.read(name.removeprefix(self._prefix), index)
