"""Attention-relation loss (MiniLM): similarities among queries, among keys and among values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from distill_jax.errors import InputError, bad_value
from distill_jax.losses import features
from distill_jax.losses._base import LayerPairLoss
from distill_jax.losses.features import Features, FeatureSpec, Pairs
from distill_jax.types import Batch, FamilyConfig, Mean, PyTree

QUERIES = 128  # rows of a relation that are in memory at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss(LayerPairLoss):
  """KL between query-query, key-key and value-value relations (MiniLMv2, arXiv:2012.15828).

  A relation is softmax(x x^T / sqrt(d)) over the positions that a position attends to. The heads
  are concatenated and split again into `heads` relation heads, so that teacher and student may
  differ in heads and widths. The loss is the mean over relation heads and the three relations.
  Layer 0 cannot be compared.
  """

  heads: int = 1
  """Number of relation heads.

  It divides the total widths of the queries, of the keys and of the values of teacher and student.
  """

  def feature_specs(
    self, pairs: Pairs, student: FamilyConfig, teacher: FamilyConfig
  ) -> tuple[FeatureSpec, FeatureSpec]:
    """Returns specs of the queries, keys and values of the paired layers.

    Raises:
      InputError: `heads` does not divide a width, or a pair names layer 0.
    """
    for role, config in (("student", student), ("teacher", teacher)):
      c = features.attention_sizes(config)
      for what, n, head in (
        ("queries", c.num_attention_heads, c.head_dim),
        ("keys", c.num_key_value_heads, c.head_dim),
        ("values", c.num_key_value_heads, c.value_head_dim),
      ):
        if self.heads < 1 or n * head % self.heads:
          expected = f"a divisor of {n * head}, the width of the {role}'s {what} ({n} heads)"
          raise bad_value("heads", self.heads, expected, "Correct it")
    ours, theirs = zip(*pairs, strict=True)
    if 0 in (*ours, *theirs):
      raise InputError("The loss 'relations' cannot compare layer 0. Name layers from 1 on.")
    return FeatureSpec(qkv=ours), FeatureSpec(qkv=theirs)

  def pair_losses(
    self,
    student: Features,
    teacher: Features,
    adapters: dict[str, PyTree],
    batch: Batch,
    pairs: Pairs,
  ) -> Iterator[Mean]:
    del adapters
    where = features.feature_positions(batch, student.qkv[pairs[0][0]][0].shape[1])
    segments = where.segments_BS
    for a, b in pairs:
      for s, t in zip(student.qkv[a], teacher.qkv[b], strict=True):
        s, t = self._split(s, segments), self._split(jax.lax.stop_gradient(t), segments)
        yield features.mean_over_labels(_relation_kl(s, t, segments, where.causal), batch)

  def _split(self, x_BTHh: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Returns x as relation heads, float32 [B, T, H, h]; 0 in padding, so that NaN is harmless."""
    B, T = segments_BT.shape
    x_BTHh = x_BTHh.reshape(B, T, self.heads, -1).astype(jnp.float32)
    return jnp.where(segments_BT[..., None, None] > 0, x_BTHh, 0)


def _relation_kl(
  s_BTHh: jax.Array, t_BTHh: jax.Array, segments_BT: jax.Array, causal: bool
) -> jax.Array:
  """Returns KL(teacher's relation || student's), averaged over H heads, float32 [B, T]."""
  B, T = segments_BT.shape
  C = min(QUERIES, T)
  n = -(-T // C)

  @jax.checkpoint  # the backward pass recomputes the rows of a block
  def block(start: jax.Array) -> jax.Array:
    at_C = jnp.minimum(start + jnp.arange(C), T - 1)
    sees_BCT = segments_BT[:, at_C, None] == segments_BT[:, None, :]
    if causal:
      sees_BCT &= at_C[None, :, None] >= jnp.arange(T)[None, None, :]

    def log_relation(x_BTHh: jax.Array) -> jax.Array:
      z = jnp.einsum("BCHh,BTHh->BHCT", x_BTHh[:, at_C], x_BTHh) / math.sqrt(x_BTHh.shape[-1])
      return jax.nn.log_softmax(jnp.where(sees_BCT[:, None], z, -1e30))

    t, s = log_relation(t_BTHh), log_relation(s_BTHh)
    return jnp.mean(jnp.sum(jnp.exp(t) * (t - s), -1), 1)  # unseen: exp(t) is 0, t - s finite

  blocks_NBC = jax.lax.map(block, jnp.arange(n) * C)
  return jnp.moveaxis(blocks_NBC, 0, 1).reshape(B, n * C)[:, :T]
