"""Hard distillation: cross-entropy with the teacher's most probable token or class."""

from __future__ import annotations

import dataclasses

import jax

from distill_jax.errors import InputError
from distill_jax.losses import _label_log_probs
from distill_jax.losses._base import TokenLoss
from distill_jax.nn import fused_head
from distill_jax.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss(TokenLoss):
  """-log q(argmax p) in nats (DeiT, arXiv:2012.12877, equation 3)."""

  teacher: str = "teacher"
  """Name of the teacher."""

  @property
  def teacher_names(self) -> tuple[str, ...]:
    return (self.teacher,)

  def check_records(self, kind: str, has_logp: bool, temperature: float, missing_mass: str) -> None:
    if kind == "labels":
      raise InputError(
        "Records of kind 'labels' lack the most probable token. Record with another records.kind."
      )

  def token_loss(self, logits_BCV: jax.Array, batch: Batch, step: jax.Array | int) -> jax.Array:
    del step
    targets = batch.targets[self.teacher]
    argmax_BC = targets.argmax(logits_BCV)
    if argmax_BC is None:
      raise InputError(
        f"The loss 'pseudo_label' needs the most probable token, but the records of "
        f"{self.teacher!r} lack it. Record again, or set train.online=True."
      )
    return _label_log_probs.where_present(targets, -fused_head.label_logp(logits_BCV, argmax_BC))
