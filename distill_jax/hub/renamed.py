"""Weights under the names that families declare, where the files have other names.

transformers saves a BertModel as "encoder.layer.0…", but the same body in a classifier as
"bert.encoder.layer.0…". A family declares the second form. And transformers 5 saves a LLaVA as
"vision_tower.encoder…", but older versions and vLLM use "vision_tower.vision_model.encoder…".
Checkpoints that were converted from TensorFlow have "LayerNorm.gamma" and "LayerNorm.beta". A
Gemma 3 that also reads images has its text part under "language_model.".
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from distill_jax.errors import InputError
from distill_jax.hub.weights import Index, Weights

ENDS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def renamed(
  weights: Weights, prefix: str = "", after: str = "", starts: Mapping[str, str] | None = None
) -> Weights:
  """Returns the weights under the names of the family.

  Args:
    weights: the reader of the weights.
    prefix: the prefix to insert, unless a name has it already; "": none.
    after: names that start with this get the prefix after it; others are unchanged. With "", all
      names get the prefix at the start.
    starts: other starts of names, with what they are replaced by.

  Raises:
    InputError: two tensors would have the same name.
  """
  names = weights.names()
  if any(name.startswith(after + prefix) for name in names):
    prefix = ""
  stored: dict[str, str] = {}
  for old in sorted(names):
    name = old
    if prefix and name.startswith(after):
      name = after + prefix + name.removeprefix(after)
    for start, new in (starts or {}).items():
      if old.startswith(start):
        name = new + old.removeprefix(start)
    for end, new in ENDS.items():
      if name.endswith(end):
        name = name.removesuffix(end) + new
    if name in stored:
      raise InputError(f"The tensors {stored[name]} and {old} are the same. Remove one of them.")
    stored[name] = old
  return weights if stored.keys() == names else Renamed(weights, stored)


class Renamed:
  """A reader of weights under other names than those in the files.

  Args:
    weights: the reader.
    stored: the name in the files for each name.
  """

  def __init__(self, weights: Weights, stored: Mapping[str, str]):
    self.files = weights.files
    self._weights, self._stored = weights, stored

  def names(self) -> set[str]:
    return set(self._stored)

  def shape(self, name: str) -> tuple[int, ...]:
    return self._weights.shape(self._stored[name])

  def dtype(self, name: str) -> np.dtype:
    return self._weights.dtype(self._stored[name])

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    return self._weights.read(self._stored[name], index)
