"""Hard labels: cross-entropy with the data's own next token."""

from __future__ import annotations

import dataclasses

import jax

from distill_jax import head
from distill_jax.schedules import Schedule, constant
from distill_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class Loss:
  """-log q(label), in nats."""

  weight: Schedule = constant(1.0)

  def per_token(self, logits_BCV: jax.Array, batch: Batch, step: jax.Array) -> jax.Array:
    del step
    return -head.logp_at(logits_BCV, batch.labels_BT[..., None])[..., 0]
