"""The teacher's likeliest token as the label: pseudo-labels, and DeiT's hard distillation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from distill_jax.errors import InputError
from distill_jax.losses import supports
from distill_jax.nn import fused_head
from distill_jax.schedules import Schedule, constant
from distill_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class Loss:
  """-log q(argmax p), in nats (arXiv:2012.12877, equation 3).

  Attributes:
    teacher: whose p.
  """

  weight: Schedule = constant(1.0)
  teacher: str = "teacher"

  def token_loss(self, logits_BCV: jax.Array, batch: Batch, step: jax.Array) -> jax.Array:
    del step
    targets = batch.targets[self.teacher]
    if targets.hidden_BTD is not None:
      top_BC = jnp.argmax(supports.dense(targets, logits_BCV, 1.0)[0], -1)
    elif targets.argmax_BT is not None:
      top_BC = targets.argmax_BT
    else:
      raise InputError(
        f"pseudo_label wants the likeliest token, which the records of {self.teacher!r} do not "
        "name; record again, or run the teacher in the step"
      )
    return -fused_head.logp_at(logits_BCV, top_BC[..., None])[..., 0]
