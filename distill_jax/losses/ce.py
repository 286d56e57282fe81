"""Hard labels: cross-entropy with the data's own next token."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from distill_jax.errors import InputError
from distill_jax.losses._base import TokenLoss
from distill_jax.nn import fused_head
from distill_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class Loss(TokenLoss):
  """-log q(label), in nats.

  Attributes:
    label_smoothing: the label has 1 minus this, every token an equal part of the rest
      (arXiv:1512.00567, section 7). Of labels that the batch smooths (data.trust), it is of what
      they have left.
    z_loss: times (log sum exp logits)^2, which keeps logits from drifting (PaLM,
      arXiv:2204.02311, section 5).
  """

  label_smoothing: float = 0.0
  z_loss: float = 0.0

  def __post_init__(self) -> None:
    super().__post_init__()
    if not 0 <= self.label_smoothing < 1 or self.z_loss < 0:
      raise InputError(
        f"label_smoothing is {self.label_smoothing} and z_loss {self.z_loss}; smoothing is from 0 "
        "to below 1, z_loss at least 0"
      )

  def token_loss(self, logits_BCV: jax.Array, batch: Batch, step: jax.Array | int) -> jax.Array:
    del step
    lse_BC = fused_head.log_sum_exp(logits_BCV)[..., 0]
    label_BC = jnp.take_along_axis(logits_BCV, batch.labels_BT[..., None], -1)[..., 0]
    loss_BC = lse_BC - label_BC
    if self.label_smoothing or batch.smoothing_BT is not None:
      own_BC = 0.0 if batch.smoothing_BT is None else batch.smoothing_BT
      kept_BC = (1 - self.label_smoothing) * (1 - own_BC)
      real_BCV = logits_BCV > -jnp.inf  # rows past the vocabulary have no probability
      mean_BC = jnp.mean(logits_BCV, -1, where=real_BCV)
      loss_BC += (1 - kept_BC) * (label_BC - mean_BC)
    if self.z_loss:
      loss_BC += self.z_loss * lse_BC**2
    return loss_BC
