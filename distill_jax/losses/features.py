"""What whole-sequence losses compare: chosen hidden states, and chosen queries, keys, values.

Nothing is kept of the other layers. Queries, keys and values of layer l are made again from
the output of layer l - 1, so a tap is all they cost.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from distill_jax.errors import InputError
from distill_jax.nn.layers import ComputeConfig
from distill_jax.types import Batch, Inputs, Mean, Output

Pairs = tuple[tuple[int, int], ...]  # (student layer, teacher layer)


class Features(struct.PyTreeNode):
  """By layer: hidden states [B, T, D], and (q, k, v) of [B, T, heads, h] each.

  `embedding_BTD` is what stands for each position's whole input, where a family has it.
  """

  hidden: dict[int, jax.Array]
  qkv: dict[int, tuple[jax.Array, jax.Array, jax.Array]]
  embedding_BTD: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
  """The layers whose features a model has to give."""

  hidden: tuple[int, ...] = ()
  qkv: tuple[int, ...] = ()

  def __or__(self, other: FeatureSpec) -> FeatureSpec:
    union = lambda a, b: tuple(sorted({*a, *b}))
    return FeatureSpec(union(self.hidden, other.hidden), union(self.qkv, other.qkv))

  @property
  def taps(self) -> tuple[int, ...]:
    """The layers whose outputs are tapped for them."""
    return tuple(sorted({*self.hidden, *(layer - 1 for layer in self.qkv)}))

  def of(self, model: Any, out: Output, inputs: Inputs, compute: ComputeConfig) -> Features:
    """The features of a model that ran with `taps`."""
    if not self.taps:
      return Features({}, {}, out.embedding_BTD)
    assert out.taps_PBTD is not None
    tapped = dict(zip(self.taps, out.taps_PBTD, strict=True))
    qkv = {layer: model.qkv(layer, tapped[layer - 1], inputs, compute) for layer in self.qkv}
    return Features({layer: tapped[layer] for layer in self.hidden}, qkv, out.embedding_BTD)


def pairs(layers: str, student: int, teacher: int) -> Pairs:
  """Which student layer learns from which teacher layer.

  Args:
    layers: "uniform" (every student layer, from teacher layers at equal steps, the last
      from the last: TinyBERT, arXiv:1909.10351), "last", or pairs as "0:4 5:29".
    student, teacher: how many layers each has.

  Raises:
    InputError: a pair that is not two numbers, or a layer that is not there.
  """
  if layers == "uniform":
    return tuple((i, (i + 1) * teacher // student - 1) for i in range(student))
  if layers == "last":
    return ((student - 1, teacher - 1),)
  try:
    a_b = [tuple(map(int, pair.split(":"))) for pair in layers.split()]
    chosen = tuple((a, b) for a, b in a_b)
  except ValueError:
    raise InputError(
      f"layers is {layers!r}; it is 'uniform', 'last' or student:teacher pairs as '0:4 5:29'"
    ) from None
  bad = [(a, b) for a, b in chosen if not (0 <= a < student and 0 <= b < teacher)]
  if bad or not chosen:
    raise InputError(
      f"layers is {layers!r}; the student has layers 0 to {student - 1} and the teacher 0 to "
      f"{teacher - 1}"
    )
  return chosen


class Places(NamedTuple):
  """Where a model's features stand among its positions.

  Attributes:
    keep_BS: bool, those that are compared.
    segments_BS: int32, the documents, 0 in padding; what a position sees is in its own.
    causal: a position sees only those before it, and itself.
  """

  keep_BS: jax.Array
  segments_BS: jax.Array
  causal: bool


def places(batch: Batch, positions: int) -> Places:
  """Of a decoder, those with labels; of an encoder, all of its `positions` but padding."""
  if batch.valid_BS is None:
    return Places(batch.mask_BT, batch.inputs.segments_BT, True)
  keep_BS = jnp.broadcast_to(batch.valid_BS, (len(batch.valid_BS), positions))
  return Places(keep_BS, keep_BS.astype(jnp.int32), False)


def mean(x_BS: jax.Array, batch: Batch) -> Mean:
  """Over labels, as every loss is; of an encoder, a label's is the mean over what was read."""
  if batch.valid_BS is None:
    return Mean.of(x_BS, batch.mask_BT)
  keep_BS = places(batch, x_BS.shape[1]).keep_BS
  total_B = jnp.sum(jnp.where(keep_BS, x_BS.astype(jnp.float32), 0), 1)
  x_B1 = (total_B / jnp.maximum(jnp.sum(keep_BS, 1), 1))[:, None]
  return Mean.of(jnp.broadcast_to(x_B1, batch.mask_BT.shape), batch.mask_BT)


def flat_qkv(qkv: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
  """(q, k, v) as one vector a position, [B, T, D], for records."""
  return jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in qkv], -1)


def unflat_qkv(x_BTD: jax.Array, config: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The inverse, for a teacher of this config."""
  H, G, h = config.num_attention_heads, config.num_key_value_heads, config.head_dim
  q, k, v = jnp.split(x_BTD, [H * h, (H + G) * h], -1)
  heads = lambda x, n: x.reshape(*x.shape[:2], n, -1)  # values may be narrower than keys
  return heads(q, H), heads(k, G), heads(v, G)
