"""Squared log-ratio of teacher and student at each token of the student's own texts."""

from __future__ import annotations

import dataclasses

import jax

from distill_jax.losses import _label_log_probs
from distill_jax.losses._base import TokenLoss
from distill_jax.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss(TokenLoss):
  """(log p(label) - log q(label))^2 / 2 in nats^2.

  Its gradient is that of the loss policy_gradient without importance ratio. So on texts that the
  student has just sampled, at temperature 1 without truncation, the expected gradient is that of
  KL(q || p). The value is the estimator k2 of that divergence (J. Schulman, "Approximating KL
  Divergence", 2020), which is biased unless p and q are close.

  The log-probability under the student that sampled the text is not needed, so texts of earlier
  rounds, or of another model, can be used. Their expected gradient then is another one, which
  vanishes at q = p all the same.
  """

  teacher: str = "teacher"
  """Name of the teacher."""

  @property
  def teacher_names(self) -> tuple[str, ...]:
    return (self.teacher,)

  def check_records(self, kind: str, has_logp: bool, temperature: float, missing_mass: str) -> None:
    _label_log_probs.check_temperature(temperature)

  def token_loss(self, logits_BCV: jax.Array, batch: Batch, step: jax.Array | int) -> jax.Array:
    del step
    targets = batch.targets[self.teacher]
    logp_BC, logq_BC = _label_log_probs.log_probs(targets, logits_BCV, batch.labels_BT)
    return _label_log_probs.where_present(targets, 0.5 * (logp_BC - logq_BC) ** 2)
