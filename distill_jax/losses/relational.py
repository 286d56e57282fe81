"""Relational knowledge: distances and angles between the tokens of a document (RKD)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.errors import InputError
from distill_jax.losses import features
from distill_jax.losses.features import Features, FeatureSpec, Pairs
from distill_jax.schedules import Schedule, constant
from distill_jax.types import Batch, Mean

POSITIONS = 32  # whose relations exist at once
# The square of a distance beside that of a vector: below it, 80 float32 roundings, two tokens are
# one, and have no direction from each other.
NOISE = 1e-10


@dataclasses.dataclass(frozen=True)
class Loss:
  """Huber loss on distances and angles between a token and those before it.

  RKD (arXiv:1904.05068, equations 3 to 7) with relations among the examples of a batch
  brought to tokens: those of a token are with the `tokens` - 1 before it in its document,
  so it is a mean over tokens, as every other loss is, and knows nothing of the batch or of
  how documents are packed. Distances are divided by their mean over the token's relations,
  so that widths may differ and no projection is needed; angles are those at the token.

  Attributes:
    layers: see features.pairs.
    tokens: a token and those that it is related to.
    angle: the weight of the angle term beside the distance term's 1; 0 leaves it out.
  """

  weight: Schedule = constant(1.0)
  teacher: str = "teacher"
  layers: str = "last"
  tokens: int = 16
  angle: float = 2.0

  def __post_init__(self):
    if self.tokens < 3 or self.angle < 0:
      raise InputError(
        f"tokens is {self.tokens} and angle {self.angle}; an angle takes 3 tokens, and its weight "
        "is at least 0"
      )

  def needs(self, pairs: Pairs, student: Any, teacher: Any) -> tuple[FeatureSpec, FeatureSpec]:
    del student, teacher
    ours, theirs = zip(*pairs, strict=True)
    return FeatureSpec(hidden=ours), FeatureSpec(hidden=theirs)

  def whole(
    self,
    student: Features,
    teacher: Features,
    adapters: dict[str, Any],
    batch: Batch,
    pairs: Pairs,
  ) -> Mean:
    del adapters
    total = Mean(jnp.zeros(()), jnp.zeros(()))
    keep = features.places(batch, student.hidden[pairs[0][0]].shape[1]).keep_BS[..., None]
    for a, b in pairs:
      s = jnp.where(keep, student.hidden[a].astype(jnp.float32), 0)
      t = jnp.where(keep, jax.lax.stop_gradient(teacher.hidden[b].astype(jnp.float32)), 0)
      total += features.mean(self._relational(s, t, batch), batch)
    return Mean(total.total / len(pairs), total.count / len(pairs))

  def _relational(self, s_BTD: jax.Array, t_BTD: jax.Array, batch: Batch) -> jax.Array:
    """The loss of each token, float32 [B, T]; 0 for one without relations."""
    B, T = s_BTD.shape[:2]
    keep_BT, segments_BT, _ = features.places(batch, T)
    C, back_R = min(POSITIONS, T), 1 + jnp.arange(self.tokens - 1)  # R relations of a token
    n = -(-T // C)

    @jax.checkpoint  # the backward pass makes a block's relations again
    def block(start: jax.Array) -> jax.Array:
      at_C = jnp.minimum(start + jnp.arange(C), T - 1)
      from_CR = at_C[:, None] - back_R[None]
      of = lambda x_BT: (x_BT[:, at_C][:, :, None], x_BT[:, jnp.maximum(from_CR, 0)])
      segment, others = of(segments_BT)
      keep, others_keep = of(keep_BT)
      real_BCR = (segment == others) & keep & others_keep & (from_CR >= 0)[None]

      def relations(x_BTD):
        x_BC1D, others_BCRD = of(x_BTD)
        e_BCRD = x_BC1D - others_BCRD
        d_BCR = _lengths(e_BCRD, real_BCR, NOISE * jnp.sum(x_BC1D * x_BC1D, -1))
        mean_BC1 = _mean(d_BCR, real_BCR)[..., None]
        units_BCRD = e_BCRD / jnp.where(d_BCR > 0, d_BCR, 1)[..., None]
        cosines = jnp.einsum("BCiD,BCjD->BCij", units_BCRD, units_BCRD)
        return d_BCR / jnp.where(mean_BC1 > 0, mean_BC1, 1), cosines

      (ds, angle_s), (dt, angle_t) = relations(s_BTD), relations(t_BTD)
      loss_BC = _mean(_huber(ds - dt), real_BCR)
      if self.angle:
        other_RR = ~jnp.eye(len(back_R), dtype=bool)
        two = real_BCR[..., :, None] & real_BCR[..., None, :] & other_RR[None, None]
        huber = _huber(angle_s - angle_t).reshape(*loss_BC.shape, -1)
        loss_BC += self.angle * _mean(huber, two.reshape(huber.shape))
      return loss_BC

    blocks_nBC = jax.lax.map(block, jnp.arange(n) * C)
    return jnp.moveaxis(blocks_nBC, 0, 1).reshape(B, n * C)[:, :T]


def _lengths(e: jax.Array, real: jax.Array, noise: jax.Array) -> jax.Array:
  """Lengths whose gradient at 0 is 0, not NaN; 0 where not real, or their squares are noise."""
  square = jnp.sum(e * e, -1)
  real &= square > noise
  return jnp.where(real, jnp.sqrt(jnp.where(real, square, 1)), 0)


def _huber(x: jax.Array) -> jax.Array:
  size = jnp.abs(x)
  return jnp.where(size <= 1, 0.5 * x * x, size - 0.5)


def _mean(x: jax.Array, where: jax.Array) -> jax.Array:
  """Over the last axis; 0 of nothing."""
  return jnp.sum(jnp.where(where, x, 0), -1) / jnp.maximum(jnp.sum(where, -1), 1)
