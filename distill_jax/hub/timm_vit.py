"""Reads the ViT checkpoints of timm under Hugging Face names.

The config.json of timm has the name of an architecture but no sizes, which are taken from the
shapes of the tensors. Queries, keys and values are one matrix in timm, which is split on reading.
"""

from __future__ import annotations

import math
import re

import numpy as np

from distill_jax.errors import InputError
from distill_jax.hub.weights import Index, Weights
from distill_jax.types import JsonObject

HEAD_DIM = 64  # the same in all of timm's vit_{tiny,small,base,large}_patch…
QKV = ("query", "key", "value")
NAMES = {  # timm's names: Hugging Face names; queries, keys and values are handled separately
  "cls_token": "vit.embeddings.cls_token",
  "pos_embed": "vit.embeddings.position_embeddings",
  "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
  "norm": "vit.layernorm",
  "head": "classifier",
}
IN_LAYER = {
  "norm1": "layernorm_before",
  "norm2": "layernorm_after",
  "attn.proj": "attention.output.dense",
  "mlp.fc1": "intermediate.dense",
  "mlp.fc2": "output.dense",
}


def is_plain_vit(hf: JsonObject) -> bool:
  """Returns whether a config.json was written by timm for a plain ViT."""
  name = hf.get("architecture")
  return isinstance(name, str) and re.fullmatch(r"vit_[a-z]+_patch\d+_\d+", name) is not None


def read(weights: Weights, path: str) -> tuple[JsonObject, Weights]:
  """Returns (the content of a Hugging Face config.json, the weights under Hugging Face names).

  Raises:
    InputError: The tensors are not those of a plain ViT with a class token.
  """
  renamed = Renamed(weights)
  shape = {name: weights.shape(name) for name in weights.names()}
  try:
    D, channels, patch, _ = shape["patch_embed.proj.weight"]
    places, labels = shape["pos_embed"][1] - 1, shape["head.weight"][0]
    mlp = shape["blocks.0.mlp.fc1.weight"][0]
  except (KeyError, IndexError, ValueError) as e:
    raise InputError(
      f"{path} is not a plain ViT of timm with a head: it lacks {e}. Choose another model."
    ) from e
  layers = len({name.split(".")[1] for name in shape if name.startswith("blocks.")})
  return {
    "model_type": "vit",
    "hidden_size": D,
    "intermediate_size": mlp,
    "num_hidden_layers": layers,
    "num_attention_heads": D // HEAD_DIM,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": math.isqrt(places) * patch,
    "patch_size": patch,
    "num_channels": channels,
    "id2label": {str(i): f"LABEL_{i}" for i in range(labels)},
  }, renamed


class Renamed:
  """A reader of timm's tensors under Hugging Face names; unknown tensors keep their names."""

  def __init__(self, weights: Weights):
    self.files, self._weights = weights.files, weights
    # Hugging Face name: (timm's name, the third of its rows or None for all).
    self._of: dict[str, tuple[str, int | None]] = {}
    for name in weights.names():
      self._of |= _theirs(name)

  def names(self) -> set[str]:
    return set(self._of)

  def shape(self, name: str) -> tuple[int, ...]:
    theirs, third = self._of[name]
    rows, *rest = self._weights.shape(theirs)
    return (rows if third is None else rows // 3, *rest)

  def dtype(self, name: str) -> np.dtype:
    return self._weights.dtype(self._of[name][0])

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    theirs, third = self._of[name]
    if third is None:
      return self._weights.read(theirs, index)
    rows, *rest = self.shape(name)
    index = index or tuple(slice(0, n) for n in (rows, *rest))
    start, stop, _ = index[0].indices(rows)
    moved = slice(third * rows + start, third * rows + stop)
    return self._weights.read(theirs, (moved, *index[1:]))


def _theirs(name: str) -> dict[str, tuple[str, int | None]]:
  """Returns {Hugging Face name: (`name`, third of its rows or None)} for a tensor of timm."""
  stem, _, end = name.rpartition(".")
  layer = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem)
  if layer is None:
    whole = NAMES.get(name) or (f"{NAMES[stem]}.{end}" if stem in NAMES else name)
    return {whole: (name, None)}
  at, part = f"vit.encoder.layer.{layer[1]}.", layer[2]
  if part == "attn.qkv":
    return {f"{at}attention.attention.{q}.{end}": (name, i) for i, q in enumerate(QKV)}
  return {f"{at}{IN_LAYER[part]}.{end}" if part in IN_LAYER else name: (name, None)}
