"""Policy gradient on the student's own texts, from the teacher's probability of each token."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from distill_jax.errors import bad_value
from distill_jax.losses import _label_log_probs
from distill_jax.losses._base import TokenLoss
from distill_jax.types import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss(TokenLoss):
  """-r A, with the advantage A = log p(label) - log q(label), a constant in the gradient.

  r = q(label) / b(label) is the importance ratio against the student that sampled the text, clipped
  as in PPO (arXiv:1707.06347, equation 7): to at most 1 + clip where A is positive, and to at least
  1 - clip where it is negative.

  On texts that were sampled at temperature 1 without truncation, the expected gradient of the label
  at a position, without clipping, is that of KL(q || p). The value is an estimate of KL(q || p).
  See "On-Policy Distillation", Thinking Machines Lab, 2025.
  """

  teacher: str = "teacher"
  """Name of the teacher."""
  clip: float = 0.2
  """Largest change of the importance ratio from 1, above 0; inf for no limit.

  Positions beyond it, in the direction of the advantage, have no gradient.
  """
  reward_weight: float = 0.0
  """Weight of the text's reward in the advantage: A + reward_weight (reward - baseline)."""
  baseline: float = 0.0
  """Reward that adds nothing to the advantage, usually about the mean reward; between 0 and 1 for
  the verdict of a filter. It reduces variance, and does not change the expected gradient."""

  def __post_init__(self) -> None:
    super().__post_init__()
    if not self.clip > 0:
      raise bad_value("clip", self.clip, "a number above 0", "Raise it")
    for key in ("reward_weight", "baseline"):
      if not math.isfinite(value := getattr(self, key)):
        raise bad_value(key, value, "a finite number", "Correct it")
    if self.baseline and not self.reward_weight:
      raise bad_value("baseline", self.baseline, "0 without reward_weight", "Set reward_weight")

  @property
  def teacher_names(self) -> tuple[str, ...]:
    return (self.teacher,)

  @property
  def rollout_scalars(self) -> tuple[str, ...]:
    return ("behaviour_logp", "reward") if self.reward_weight else ("behaviour_logp",)

  def check_records(self, kind: str, has_logp: bool, temperature: float, missing_mass: str) -> None:
    _label_log_probs.check_temperature(temperature)

  def token_loss(self, logits_BCV: jax.Array, batch: Batch, step: jax.Array | int) -> jax.Array:
    del step
    targets, rollout = batch.targets[self.teacher], batch.rollout
    assert rollout is not None
    logp_BC, logq_BC = _label_log_probs.log_probs(targets, logits_BCV, batch.labels_BT)
    advantage_BC = logp_BC - jax.lax.stop_gradient(logq_BC)
    if self.reward_weight:
      assert rollout.reward_BT is not None
      advantage_BC += self.reward_weight * (rollout.reward_BT - self.baseline)
    ratio_BC = jnp.exp(logq_BC - rollout.behaviour_logp_BT)
    low_BC = jnp.maximum(ratio_BC, 1 - self.clip)
    high_BC = jnp.minimum(ratio_BC, 1 + self.clip)
    ratio_BC = jnp.where(advantage_BC > 0, high_BC, low_BC)
    return _label_log_probs.where_present(targets, -ratio_BC * advantage_BC)
