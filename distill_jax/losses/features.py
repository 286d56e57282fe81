"""What feature losses compare: hidden states, and queries, keys and values, of chosen layers.

No other layer's outputs are kept. Queries, keys and values of layer l are recomputed from the
output of layer l - 1, so they cost no more than its tap.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
from flax import struct

from distill_jax.errors import InputError
from distill_jax.nn.layers import ComputeConfig
from distill_jax.types import QKV, Batch, FamilyConfig, Inputs, Mean, Model, ModelInputs, Output

Pairs = tuple[tuple[int, int], ...]  # (student layer, teacher layer)


class AttentionSizes(FamilyConfig, Protocol):
  """The config of a model with attention, whose queries, keys and values can be compared."""

  @property
  def num_attention_heads(self) -> int:
    """Heads of queries."""

  @property
  def num_key_value_heads(self) -> int:
    """Heads of keys and values."""

  @property
  def head_dim(self) -> int:
    """Width of one head's queries and keys."""

  @property
  def value_head_dim(self) -> int:
    """Width of one head's values; DeepSeek's are narrower than its keys."""


def attention_sizes(config: FamilyConfig) -> AttentionSizes:
  """Returns the config, of a model that is known to have attention, as what it is."""
  return cast(AttentionSizes, config)


class Features(struct.PyTreeNode):
  """A model's features: by layer, hidden states [B, T, D], and (q, k, v), each [B, T, heads, h].

  `embedding_BTD` is the embedding of each position's whole input, where a family has it.
  """

  hidden: dict[int, jax.Array]
  qkv: dict[int, QKV]
  embedding_BTD: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
  """The layers whose features are extracted from a model."""

  hidden: tuple[int, ...] = ()
  qkv: tuple[int, ...] = ()

  def __or__(self, other: FeatureSpec) -> FeatureSpec:
    hidden = tuple(sorted({*self.hidden, *other.hidden}))
    return FeatureSpec(hidden, tuple(sorted({*self.qkv, *other.qkv})))

  @property
  def taps(self) -> tuple[int, ...]:
    """The layers whose outputs are tapped for them."""
    return tuple(sorted({*self.hidden, *(layer - 1 for layer in self.qkv)}))

  def extract(
    self, model: Model, out: Output, inputs: ModelInputs, compute: ComputeConfig
  ) -> Features:
    """The features from the outputs of a model that ran with `taps`."""
    if not self.taps:
      return Features({}, {}, out.embedding_BTD)
    assert out.taps_PBTD is not None
    tapped = dict(zip(self.taps, out.taps_PBTD, strict=True))
    qkv = {layer: model.qkv(layer, tapped[layer - 1], inputs, compute) for layer in self.qkv}
    return Features({layer: tapped[layer] for layer in self.hidden}, qkv, out.embedding_BTD)


def pairs(layers: str, student: int, teacher: int) -> Pairs:
  """Pairs each trained student layer with the teacher layer that it is compared to.

  Args:
    layers: "uniform" (every student layer with teacher layers at equal steps, the last with
      the last: TinyBERT, arXiv:1909.10351), "last", or pairs such as "0:4 5:29".
    student, teacher: their numbers of layers.

  Raises:
    InputError: a pair is not two numbers, or there is no such layer.
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
      f"layers is {layers!r}; it is 'uniform', 'last' or student:teacher pairs such as '0:4 5:29'"
    ) from None
  bad = [(a, b) for a, b in chosen if not (0 <= a < student and 0 <= b < teacher)]
  if bad or not chosen:
    raise InputError(
      f"layers is {layers!r}; the student has layers 0 to {student - 1} and the teacher 0 to "
      f"{teacher - 1}"
    )
  return chosen


class FeaturePositions(NamedTuple):
  """The positions of a model's features.

  Attributes:
    valid_BS: bool, those that are compared.
    segments_BS: int32, the documents, 0 in padding; a position attends within its own.
    causal: a position attends to earlier ones and itself only.
  """

  valid_BS: jax.Array
  segments_BS: jax.Array
  causal: bool


def feature_positions(batch: Batch, positions: int) -> FeaturePositions:
  """Positions whose features are compared.

  Those with a label for decoders, all of the `positions` that are not padding for encoders.
  """
  if batch.valid_BS is None:
    assert isinstance(batch.inputs, Inputs)
    return FeaturePositions(batch.mask_BT, batch.inputs.segments_BT, True)
  valid_BS = jnp.broadcast_to(batch.valid_BS, (len(batch.valid_BS), positions))
  return FeaturePositions(valid_BS, valid_BS.astype(jnp.int32), False)


def mean_over_labels(x_BS: jax.Array, batch: Batch) -> Mean:
  """Mean over labels. For encoders, each label counts the mean over its input positions."""
  if batch.valid_BS is None:
    return Mean.of(x_BS, batch.mask_BT)
  valid_BS = feature_positions(batch, x_BS.shape[1]).valid_BS
  total_B = jnp.sum(jnp.where(valid_BS, x_BS.astype(jnp.float32), 0), 1)
  x_B1 = (total_B / jnp.maximum(jnp.sum(valid_BS, 1), 1))[:, None]
  return Mean.of(jnp.broadcast_to(x_B1, batch.mask_BT.shape), batch.mask_BT)


def flat_qkv(qkv: QKV) -> jax.Array:
  """Joins (q, k, v) to one vector a position, [B, T, D], for records."""
  return jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in qkv], -1)


def unflat_qkv(x_BTD: jax.Array, config: FamilyConfig) -> QKV:
  """The inverse of flat_qkv, for a teacher of this config."""
  c = attention_sizes(config)
  H, G, h = c.num_attention_heads, c.num_key_value_heads, c.head_dim
  q, k, v = jnp.split(x_BTD, [H * h, (H + G) * h], -1)
  q, k, v = (x.reshape(*x.shape[:2], n, -1) for x, n in ((q, H), (k, G), (v, G)))
  return q, k, v  # values may be narrower than keys
