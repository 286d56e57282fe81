"""Weights whose names lack a prefix, read under the names with the prefix.

transformers saves a BertModel as "encoder.layer.0…", but the same body in a classifier as
"bert.encoder.layer.0…". A family declares the second form. And transformers 5 saves a LLaVA as
"vision_tower.encoder…", but older versions and vLLM use "vision_tower.vision_model.encoder…".
"""

from __future__ import annotations

import numpy as np

from distill_jax.hub.weights import Index, Weights


def prefixed(weights: Weights, prefix: str, after: str = "") -> Weights:
  """Returns the weights with `prefix` in their names, unless a name has it already.

  Args:
    weights: the reader of the weights.
    prefix: the prefix to insert.
    after: names that start with this get the prefix after it; others are unchanged. With "", all
      names get the prefix at the start.
  """
  if not prefix or any(name.startswith(after + prefix) for name in weights.names()):
    return weights
  return Prefixed(weights, prefix, after)


class Prefixed:
  """A reader that inserts a prefix into the names of weights; see `prefixed`."""

  def __init__(self, weights: Weights, prefix: str, after: str = ""):
    self.files = weights.files
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
