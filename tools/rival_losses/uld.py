"""Universal logit distillation: sorted probabilities, whatever the tokens (arXiv:2402.12030).

A rival for the comparison in docs/results, on records that tools/sorted_records.py makes:

  registry.add_folder("losses", "tools/rival_losses")
  c.losses.soft = config.loss("uld")
"""

import dataclasses

import jax
import jax.numpy as jnp

from distill_jax.losses import TokenLoss


@dataclasses.dataclass(frozen=True)
class Loss(TokenLoss):
  """sum over ranks k of |q_(k) - p_(k)|, with both distributions in descending order."""

  teacher: str = "teacher"
  """Name of the teacher."""

  @property
  def teacher_names(self):
    return (self.teacher,)

  def token_loss(self, logits_BCV, batch, step):
    del step
    targets = batch.targets[self.teacher]  # ids are ranks
    p_BCK, ids_BCK = targets.weight_BTK, targets.ids_BTK
    top_BCK, _ = jax.lax.top_k(logits_BCV, p_BCK.shape[-1])
    q_BCK = jnp.exp(top_BCK - jax.nn.logsumexp(logits_BCV, -1, keepdims=True))
    others_BC = 1 - jnp.sum(q_BCK, -1)  # p is 0 there
    left_out_BC = ids_BCK[..., 0] != 0
    loss_BC = jnp.sum(jnp.abs(q_BCK - p_BCK), -1) + others_BC
    return jnp.where(left_out_BC, 0.0, loss_BC)
