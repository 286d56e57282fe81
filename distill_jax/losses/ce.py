"""Hard-label loss: cross-entropy with the correct token or class."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from distill_jax.errors import bad_value
from distill_jax.losses._base import TokenLoss
from distill_jax.nn import fused_head
from distill_jax.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss(TokenLoss):
  """Cross-entropy -log q(label), in nats."""

  label_smoothing: float = 0.0
  """Probability, from 0 to below 1, spread evenly over all tokens (arXiv:1512.00567, section 7).

  Labels that `data.trust` already smooths are smoothed further: 1 - label_smoothing of their
  remaining probability stays on the label.
  """
  z_loss: float = 0.0
  """Coefficient of (log sum exp logits)^2, which keeps logits from drifting.

  See PaLM, arXiv:2204.02311, section 5.
  """

  def __post_init__(self) -> None:
    super().__post_init__()
    if not 0 <= self.label_smoothing < 1:
      raise bad_value(
        "label_smoothing", self.label_smoothing, "a number from 0 to below 1", "Lower it"
      )
    if self.z_loss < 0:
      raise bad_value("z_loss", self.z_loss, "at least 0", "Set 0 to leave the term out")

  def token_loss(self, logits_BCV: jax.Array, batch: Batch, step: jax.Array | int) -> jax.Array:
    del step
    lse_BC = fused_head.log_sum_exp(logits_BCV)[..., 0]
    label_BC = fused_head.label_logit(logits_BCV, batch.labels_BT)
    loss_BC = lse_BC - label_BC
    if self.label_smoothing or batch.smoothing_BT is not None:
      own_BC = 0.0 if batch.smoothing_BT is None else batch.smoothing_BT
      kept_BC = (1 - self.label_smoothing) * (1 - own_BC)
      real_BCV = logits_BCV > -jnp.inf  # padding rows of the head have probability 0
      mean_BC = jnp.mean(logits_BCV, -1, where=real_BCV)
      loss_BC += (1 - kept_BC) * (label_BC - mean_BC)
    if self.z_loss:
      loss_BC += self.z_loss * lse_BC**2
    return loss_BC
