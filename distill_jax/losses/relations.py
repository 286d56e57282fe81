"""Attention relations: how queries, keys and values relate among themselves (MiniLM)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from distill_jax.errors import InputError
from distill_jax.losses import features
from distill_jax.losses._base import LayerPairLoss
from distill_jax.losses.features import Features, FeatureSpec, Pairs
from distill_jax.types import Batch, FamilyConfig, Mean, PyTree

QUERIES = 128  # rows of a relation at once


@dataclasses.dataclass(frozen=True)
class Loss(LayerPairLoss):
  """KL between query-query, key-key and value-value relations (MiniLMv2, arXiv:2012.15828).

  A relation is softmax(x x^T / sqrt(d)) over the positions that a position can see. All
  heads are joined and split anew into `heads` relation heads, so that teacher and student
  may have other heads and widths. The mean over relation heads and the three relations.
  Rows of a relation exist for a block of positions at a time.

  Attributes:
    layers: see features.pairs; not layer 0.
    heads: relation heads; they divide the joined width of queries and of keys on both sides.
  """

  heads: int = 1

  def feature_specs(
    self, pairs: Pairs, student: FamilyConfig, teacher: FamilyConfig
  ) -> tuple[FeatureSpec, FeatureSpec]:
    """Queries, keys and values of the paired layers."""
    for role, config in (("student", student), ("teacher", teacher)):
      c = features.attention_sizes(config)
      for n in (c.num_attention_heads, c.num_key_value_heads):
        if self.heads < 1 or n * c.head_dim % self.heads:
          raise InputError(
            f"relations have {self.heads} heads and the {role} {n} of {c.head_dim}, which they do "
            "not divide; choose another losses.….heads"
          )
    ours, theirs = zip(*pairs, strict=True)
    if 0 in (*ours, *theirs):
      raise InputError("relations of layer 0 cannot be tapped; name layers from 1 on")
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
    """In relation heads, float32 [B, T, H, h]; 0 in padding, where a NaN would reach gradients."""
    B, T = segments_BT.shape
    x_BTHh = x_BTHh.reshape(B, T, self.heads, -1).astype(jnp.float32)
    return jnp.where(segments_BT[..., None, None] > 0, x_BTHh, 0)


def _relation_kl(
  s_BTHh: jax.Array, t_BTHh: jax.Array, segments_BT: jax.Array, causal: bool
) -> jax.Array:
  """KL(teacher's relation || student's), mean over H relation heads, float32 [B, T]."""
  B, T = segments_BT.shape
  C = min(QUERIES, T)
  n = -(-T // C)

  @jax.checkpoint  # the backward pass makes a block's rows again
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
