"""Soft labels: a divergence between teacher and student at a temperature, times its square."""

from __future__ import annotations

import dataclasses

import jax

from distill_jax.errors import InputError
from distill_jax.losses import divergences, supports
from distill_jax.losses._base import TokenLoss
from distill_jax.schedules import Schedule, constant
from distill_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class Loss(TokenLoss):
  """temperature^2 D(p, q) in nats, of p and q at the temperature (arXiv:1503.02531, section 2.1).

  Attributes:
    temperature: of teacher and student.
    teacher: whose targets.
    divergence: its name; see divergences.py.
    parameters: the divergence's, by name; those left out are at their defaults.
  """

  temperature: Schedule = constant(1.0)
  teacher: str = "teacher"
  divergence: str = "forward_kl"
  parameters: dict[str, float] = dataclasses.field(default_factory=dict)

  def __post_init__(self) -> None:
    super().__post_init__()
    divergences.named(self.divergence, self.parameters)
    if min(self.temperature.values) <= 0:
      raise InputError(f"temperature is {self.temperature.values}; it is above 0 at every step")

  @property
  def teacher_names(self) -> tuple[str, ...]:
    return (self.teacher,)

  def check_records(self, kind: str, has_logp: bool, temperature: float, missing_mass: str) -> None:
    changes = any(value != temperature for value in self.temperature.values)
    supports.check(kind, has_logp, self.divergence, changes, missing_mass)

  def token_loss(self, logits_BCV: jax.Array, batch: Batch, step: jax.Array | int) -> jax.Array:
    temperature = self.temperature(step)
    targets = batch.targets[self.teacher]
    if self.divergence == "forward_kl":
      return temperature**2 * targets.forward_kl(logits_BCV, temperature)
    terms = divergences.named(self.divergence, self.parameters)
    return temperature**2 * targets.divergence(terms, logits_BCV, temperature)
