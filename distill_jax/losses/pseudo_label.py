"""The teacher's most probable token as the label: pseudo-labels, and DeiT's hard distillation."""

from __future__ import annotations

import dataclasses

import jax

from distill_jax.errors import InputError
from distill_jax.losses._base import TokenLoss
from distill_jax.nn import fused_head
from distill_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class Loss(TokenLoss):
  """-log q(argmax p), in nats (arXiv:2012.12877, equation 3).

  Attributes:
    teacher: whose p.
  """

  teacher: str = "teacher"

  @property
  def teacher_names(self) -> tuple[str, ...]:
    return (self.teacher,)

  def token_loss(self, logits_BCV: jax.Array, batch: Batch, step: jax.Array | int) -> jax.Array:
    del step
    argmax_BC = batch.targets[self.teacher].argmax(logits_BCV)
    if argmax_BC is None:
      raise InputError(
        f"pseudo_label needs the most probable token, which the records of {self.teacher!r} do "
        "not hold; record again, or run the teacher in the step"
      )
    return -fused_head.label_logp(logits_BCV, argmax_BC)
