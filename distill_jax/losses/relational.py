"""Relational knowledge: distances and angles between the tokens of a sequence (RKD)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.errors import InputError
from distill_jax.features import Features, Needs, Pairs
from distill_jax.schedules import Schedule, constant
from distill_jax.types import Batch, Mean


@dataclasses.dataclass(frozen=True)
class Loss:
  """Huber loss on pairwise distances and on angles of triples (RKD, arXiv:1904.05068).

  Distances are divided by their mean, so that widths may differ and no projection is needed.
  The relations are those among `tokens` positions of a sequence, evenly spaced; so the loss
  is a sum over sequences and knows nothing of the batch.

  Attributes:
    angle: the weight of the angle term beside the distance term's 1; 0 leaves it out.
  """

  weight: Schedule = constant(1.0)
  teacher: str = "teacher"
  layers: str = "last"
  tokens: int = 32
  angle: float = 2.0

  def __post_init__(self):
    if self.tokens < 3 or self.angle < 0:
      raise InputError(
        f"tokens is {self.tokens} and angle {self.angle}; an angle takes 3 tokens, and its weight "
        "is at least 0"
      )

  def needs(self, pairs: Pairs, student: Any, teacher: Any) -> tuple[Needs, Needs]:
    del student, teacher
    ours, theirs = zip(*pairs, strict=True)
    return Needs(hidden=ours), Needs(hidden=theirs)

  def whole(
    self, student: Features, teacher: Features, adapters: dict[str, Any], batch: Batch,
    pairs: Pairs,
  ) -> Mean:  # fmt: skip
    del adapters
    T = batch.mask_BT.shape[1]
    at = jnp.linspace(0, T - 1, min(self.tokens, T)).astype(jnp.int32)
    keep_Bm = batch.mask_BT[:, at]
    total_B = jnp.zeros(len(keep_Bm))
    for a, b in pairs:
      s = student.hidden[a][:, at].astype(jnp.float32)
      t = jax.lax.stop_gradient(teacher.hidden[b][:, at].astype(jnp.float32))
      total_B += jax.vmap(_relational, in_axes=(0, 0, 0, None))(s, t, keep_Bm, self.angle)
    # Each sequence counts by its tokens, as every other loss does.
    tokens_B = jnp.sum(batch.mask_BT, 1, dtype=jnp.float32)
    return Mean(jnp.sum(total_B * tokens_B) / len(pairs), jnp.sum(tokens_B))


def _relational(s_mD: jax.Array, t_mD: jax.Array, keep_m: jax.Array, angle: float) -> jax.Array:
  """The loss of one sequence, a mean over its pairs and triples; 0 with fewer than 2 tokens."""
  s_mD, t_mD = (jnp.where(keep_m[:, None], x, 0) for x in (s_mD, t_mD))
  other = ~jnp.eye(len(keep_m), dtype=bool)
  pair_mm = keep_m[:, None] & keep_m[None, :] & other
  loss = _mean(_huber(_distances(s_mD, pair_mm) - _distances(t_mD, pair_mm)), pair_mm)
  if angle:
    triple = pair_mm[:, :, None] & pair_mm[:, None, :] & other[None]
    loss += angle * _mean(_huber(_angles(s_mD, pair_mm) - _angles(t_mD, pair_mm)), triple)
  return loss


def _distances(x_mD: jax.Array, pair_mm: jax.Array) -> jax.Array:
  """Pairwise distances over their mean; 0 where there is no pair."""
  d = _lengths(x_mD[:, None] - x_mD[None, :], pair_mm)
  mean = _mean(d, pair_mm)
  return d / jnp.where(mean > 0, mean, 1)


def _angles(x_mD: jax.Array, pair_mm: jax.Array) -> jax.Array:
  """Cosines of the angle at token i between tokens j and k, [m, m, m]."""
  e_mmD = x_mD[None, :] - x_mD[:, None]
  length = _lengths(e_mmD, pair_mm)[..., None]
  e_mmD = jnp.where(length > 0, e_mmD / jnp.where(length > 0, length, 1), 0)
  return jnp.einsum("ijD,ikD->ijk", e_mmD, e_mmD)


def _lengths(e_mmD: jax.Array, pair_mm: jax.Array) -> jax.Array:
  """Lengths whose gradient at 0 is 0, not NaN."""
  square = jnp.sum(e_mmD**2, -1)
  real = pair_mm & (square > 0)
  return jnp.where(real, jnp.sqrt(jnp.where(real, square, 1)), 0)


def _huber(x: jax.Array) -> jax.Array:
  size = jnp.abs(x)
  return jnp.where(size <= 1, 0.5 * x * x, size - 0.5)


def _mean(x: jax.Array, where: jax.Array) -> jax.Array:
  return jnp.sum(jnp.where(where, x, 0)) / jnp.maximum(jnp.sum(where), 1)
