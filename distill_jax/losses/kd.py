"""Soft-label loss: a divergence between teacher and student at a temperature."""

from __future__ import annotations

import dataclasses

import jax

from distill_jax.errors import bad_value
from distill_jax.losses import divergences
from distill_jax.losses._base import TokenLoss
from distill_jax.losses.targets import check_unbiased
from distill_jax.schedules import Schedule, constant
from distill_jax.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss(TokenLoss):
  """temperature^2 D(p, q) in nats, with p and q at the temperature.

  See "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, section 2.1.
  """

  temperature: Schedule = constant(1.0)
  """Temperature of teacher and student: a positive number or a schedule."""
  teacher: str = "teacher"
  """Name of the teacher."""
  divergence: str = "forward_kl"
  """Name of the divergence; see losses/divergences.py.

  One of "forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl",
  "adaptive_kl", "alpha_beta" and "total_variation".
  """
  parameters: dict[str, float] = dataclasses.field(default_factory=dict)
  """Parameters of the divergence, by name, e.g. {"beta": 0.5}; missing ones have their defaults."""

  def __post_init__(self) -> None:
    super().__post_init__()
    divergences.named(self.divergence, self.parameters)
    if min(self.temperature.values) <= 0:
      raise bad_value(
        "temperature", self.temperature.values, "values above 0 at every step", "Raise it"
      )

  @property
  def teacher_names(self) -> tuple[str, ...]:
    return (self.teacher,)

  def check_records(self, kind: str, has_logp: bool, temperature: float, missing_mass: str) -> None:
    changes = any(value != temperature for value in self.temperature.values)
    check_unbiased(kind, has_logp, self.divergence, changes, missing_mass)

  def token_loss(self, logits_BCV: jax.Array, batch: Batch, step: jax.Array | int) -> jax.Array:
    temperature = self.temperature(step)
    targets = batch.targets[self.teacher]
    if self.divergence == "forward_kl":
      return temperature**2 * targets.forward_kl(logits_BCV, temperature)
    terms = divergences.named(self.divergence, self.parameters)
    return temperature**2 * targets.divergence(terms, logits_BCV, temperature)
