"""Soft labels: T^2 KL(p_T || q_T) from teacher to student (arXiv:1503.02531, section 2.1)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from distill_jax import head
from distill_jax.schedules import Schedule, constant
from distill_jax.types import Batch, Targets


@dataclasses.dataclass(frozen=True)
class Loss:
  """Kullback-Leibler divergence at temperature T, times T^2, in nats.

  From sampled records the sum over p is an unbiased estimate, and its gradient too; from an
  online teacher it is exact.
  """

  weight: Schedule = constant(1.0)
  temperature: Schedule = constant(1.0)
  teacher: str = "teacher"

  def per_token(self, logits_BCV: jax.Array, batch: Batch, step: jax.Array) -> jax.Array:
    T = self.temperature(step)
    return T**2 * forward_kl(batch.targets[self.teacher], logits_BCV, T)


def forward_kl(targets: Targets, logits_BCV: jax.Array, T: jax.Array | float = 1.0) -> jax.Array:
  """KL(p_T || q_T) per position, float32 [B, C]: the entropy term is a true number too."""
  if targets.hidden_BTD is not None:
    assert targets.head_VD is not None
    logp_BCV = jax.nn.log_softmax(head.logits(targets.hidden_BTD, targets.head_VD) / T)
    logq_BCV = jax.nn.log_softmax(logits_BCV / T)
    return jnp.sum(jnp.exp(logp_BCV) * (logp_BCV - logq_BCV), -1)
  assert targets.ids_BTK is not None and targets.weight_BTK is not None
  assert targets.entropy_BT is not None
  logq_BCK = head.logp_at(logits_BCV / T, targets.ids_BTK)
  return -targets.entropy_BT - jnp.sum(targets.weight_BTK * logq_BCK, -1)
