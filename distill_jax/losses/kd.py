"""Soft labels: T^2 times a divergence between teacher and student at temperature T."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from distill_jax.errors import InputError
from distill_jax.losses import divergences, supports
from distill_jax.nn import fused_head
from distill_jax.schedules import Schedule, constant
from distill_jax.types import Batch, Targets


@dataclasses.dataclass(frozen=True)
class Loss:
  """T^2 D(p_T, q_T) in nats (arXiv:1503.02531, section 2.1, for the T^2).

  Attributes:
    weight, temperature: schedules of the step.
    teacher: whose targets.
    divergence, parameters: see divergences.py; () leaves the parameters at their defaults.
    missing_mass: over top-k records, the convention that they were made with.
  """

  weight: Schedule = constant(1.0)
  temperature: Schedule = constant(1.0)
  teacher: str = "teacher"
  divergence: str = "forward_kl"
  parameters: tuple[float, ...] = ()
  missing_mass: str = "tail_bucket"

  def __post_init__(self):
    divergences.named(self.divergence, self.parameters)
    if min(self.temperature.values) <= 0:
      raise InputError(f"temperature is {self.temperature.values}; it is above 0 at every step")

  def token_loss(self, logits_BCV: jax.Array, batch: Batch, step: jax.Array) -> jax.Array:
    T = self.temperature(step)
    targets = batch.targets[self.teacher]
    if self.divergence == "forward_kl" and targets.weight_BTK is not None:
      return T**2 * sampled_forward_kl(targets, logits_BCV, T)
    terms = divergences.named(self.divergence, self.parameters)
    return T**2 * supports.divergence(terms, targets, logits_BCV, T, self.missing_mass)


def sampled_forward_kl(targets: Targets, logits_BCV: jax.Array, T: jax.Array | float) -> jax.Array:
  """-H(p) - sum_i w_i log q_i: the one divergence that counts alone serve without bias.

  With stored log-probabilities the weights follow any T; without, p is as recorded.
  """
  if targets.logp_BTK is not None:
    logp_BCK, logq_BCK, weight_BCK = supports.sampled(targets, logits_BCV, T)
    return jnp.sum(jnp.where(weight_BCK > 0, weight_BCK * (logp_BCK - logq_BCK), 0.0), -1)
  assert targets.ids_BTK is not None and targets.weight_BTK is not None
  assert targets.entropy_BT is not None
  logq_BCK = fused_head.logp_at(logits_BCV / T, targets.ids_BTK)
  return -targets.entropy_BT - jnp.sum(targets.weight_BTK * logq_BCK, -1)
