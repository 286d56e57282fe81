"""Relational loss (RKD): distances and angles between the tokens of a document."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.errors import bad_value
from distill_jax.losses import features
from distill_jax.losses._base import LayerPairLoss
from distill_jax.losses.features import FeaturePositions, Features, Pairs
from distill_jax.types import Batch, Mean, PyTree

POSITIONS = 32  # positions whose relations are in memory at once
# Squared distances below NOISE times the squared length of a vector (about 80 float32 rounding
# errors) count as 0: the direction between the tokens would be noise.
NOISE = 1e-10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss(LayerPairLoss):
  """Huber loss on distances and angles between a token and the tokens before it.

  RKD (arXiv:1904.05068, equations 3 to 7) relates the examples of a batch. Here each token is
  related to the `tokens` - 1 tokens before it in its document instead. The loss is then a mean
  over tokens and does not depend on the batch or on how documents are packed.

  Distances are divided by their mean over the token's relations, so that widths may differ without
  a projection. Angles are measured at the token.
  """

  tokens: int = 16
  """Number of tokens in a window: a token and those before it that it is related to; at least 3."""
  angle: float = 2.0
  """Weight of the angle term; the distance term has weight 1. 0 to leave the angle term out."""

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.tokens < 3:
      raise bad_value("tokens", self.tokens, "at least 3, which an angle needs", "Raise it")
    if self.angle < 0:
      raise bad_value("angle", self.angle, "at least 0", "Set 0 to leave the angle term out")

  def pair_losses(
    self,
    student: Features,
    teacher: Features,
    adapters: dict[str, PyTree],
    batch: Batch,
    pairs: Pairs,
  ) -> Iterator[Mean]:
    del adapters
    where = features.feature_positions(batch, student.hidden[pairs[0][0]].shape[1])
    valid_BS1 = where.valid_BS[..., None]
    for a, b in pairs:
      s = jnp.where(valid_BS1, student.hidden[a].astype(jnp.float32), 0)
      t = jax.lax.stop_gradient(teacher.hidden[b].astype(jnp.float32))
      t = jnp.where(valid_BS1, t, 0)
      yield features.mean_over_labels(self._token_losses(s, t, where), batch)

  def _token_losses(self, s_BTD: jax.Array, t_BTD: jax.Array, where: FeaturePositions) -> jax.Array:
    """Returns the loss of each token, float32 [B, T]; 0 for a token without relations.

    Relations are computed for blocks of C tokens; N is the number of relations of a token.
    """
    B, T = s_BTD.shape[:2]
    C, back_N = min(POSITIONS, T), 1 + jnp.arange(self.tokens - 1)
    blocks = -(-T // C)

    @jax.checkpoint  # the backward pass recomputes the relations of a block
    def block(start: jax.Array) -> jax.Array:
      at_C = jnp.minimum(start + jnp.arange(C), T - 1)
      window = _Window(at_C, at_C[:, None] - back_N[None])
      real_BCN = window.real(where)
      (ds, angle_s), (dt, angle_t) = (_relations(x, window, real_BCN) for x in (s_BTD, t_BTD))
      loss_BC = _mean(_huber(ds - dt), real_BCN)
      if self.angle:
        other_NN = ~jnp.eye(len(back_N), dtype=bool)
        both = real_BCN[..., :, None] & real_BCN[..., None, :] & other_NN[None, None]
        huber = _huber(angle_s - angle_t).reshape(*loss_BC.shape, -1)
        loss_BC += self.angle * _mean(huber, both.reshape(huber.shape))
      return loss_BC

    loss_NBC = jax.lax.map(block, jnp.arange(blocks) * C)
    return jnp.moveaxis(loss_NBC, 0, 1).reshape(B, blocks * C)[:, :T]


class _Window(NamedTuple):
  """A block of C tokens, and the N positions before each one."""

  at_C: jax.Array
  before_CN: jax.Array  # negative before the start of the row

  def gather(self, x_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns values of the tokens [B, C, 1, ...] and of those before them [B, C, N, ...]."""
    return x_BT[:, self.at_C][:, :, None], x_BT[:, jnp.maximum(self.before_CN, 0)]

  def real(self, where: FeaturePositions) -> jax.Array:
    """Returns bool [B, C, N], True where both tokens are compared and in one document."""
    segment_BC1, others_BCN = self.gather(where.segments_BS)
    valid_BC1, others_valid_BCN = self.gather(where.valid_BS)
    in_row = (self.before_CN >= 0)[None]
    return (segment_BC1 == others_BCN) & valid_BC1 & others_valid_BCN & in_row


def _relations(
  x_BTD: jax.Array, window: _Window, real_BCN: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns normalised distances [B, C, N] and cosines of angles at the token [B, C, N, N]."""
  x_BC1D, others_BCND = window.gather(x_BTD)
  e_BCND = x_BC1D - others_BCND
  d_BCN = _lengths(e_BCND, real_BCN, NOISE * jnp.sum(x_BC1D * x_BC1D, -1))
  mean_BC1 = _mean(d_BCN, real_BCN)[..., None]
  units_BCND = e_BCND / jnp.where(d_BCN > 0, d_BCN, 1)[..., None]
  cosines = jnp.einsum("BCiD,BCjD->BCij", units_BCND, units_BCND)
  return d_BCN / jnp.where(mean_BC1 > 0, mean_BC1, 1), cosines


def _lengths(e: jax.Array, real: jax.Array, noise: jax.Array) -> jax.Array:
  """Returns vector lengths with gradient 0 at 0, not NaN; 0 where not `real` or below `noise`."""
  square = jnp.sum(e * e, -1)
  real &= square > noise
  return jnp.where(real, jnp.sqrt(jnp.where(real, square, 1)), 0)


def _huber(x: jax.Array) -> jax.Array:
  size = jnp.abs(x)
  return jnp.where(size <= 1, 0.5 * x * x, size - 0.5)


def _mean(x: jax.Array, where: jax.Array) -> jax.Array:
  """Returns the mean over the last axis; 0 for an empty selection."""
  return jnp.sum(jnp.where(where, x, 0), -1) / jnp.maximum(jnp.sum(where, -1), 1)
