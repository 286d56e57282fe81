"""Approximate likelihood matching: probabilities of spans of the text, for any tokenizers."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from distill_jax.errors import bad_value
from distill_jax.losses import _label_log_probs
from distill_jax.losses._base import TokenLoss
from distill_jax.losses.targets import SpanTargets
from distill_jax.nn import fused_head
from distill_jax.types import Batch

EPSILON = 1e-6  # subtracted from log-probabilities at the temperature, so that they are below 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss(TokenLoss):
  """temperature KL(Bernoulli(P^(1/temperature)) || Bernoulli(Q^(1/temperature))) in nats.

  P and Q are the teacher's and the student's probability of a span of the text (ALM,
  arXiv:2503.20083, section 3). A span ends where a token ends in both tokenizations. So the loss
  needs the teacher's log-probabilities of the text's tokens only, and works with every kind of
  records in the teacher's tokens. With targets in the student's tokens, every label is a
  span.

  The divergence is multiplied by the temperature, so that its gradient does not vanish as the
  temperature rises: it tends to that of KL(Poisson(-log P) || Poisson(-log Q)).

  The sum over spans is divided by the number of labels, as in all losses. The labels of a span are
  in one row. So neither packing nor microbatches change the gradient.
  """

  reads_spans: ClassVar[bool] = True

  temperature: float = 100.0
  """Temperature of the spans' probabilities, above 0. At high ones, the divergence depends on the
  logarithms of P and Q; at 1, on P and Q, so that improbable spans hardly count."""
  teacher: str = "teacher"
  """Name of the teacher."""

  def __post_init__(self) -> None:
    super().__post_init__()
    if not self.temperature > 0:
      raise bad_value("temperature", self.temperature, "a number above 0", "Raise it")

  @property
  def teacher_names(self) -> tuple[str, ...]:
    return (self.teacher,)

  def check_records(self, kind: str, has_logp: bool, temperature: float, missing_mass: str) -> None:
    _label_log_probs.check_temperature(temperature)

  def token_loss(self, logits_BCV: jax.Array, batch: Batch, step: jax.Array | int) -> jax.Array:
    del step
    targets = batch.targets[self.teacher]
    if not isinstance(targets, SpanTargets):
      logp_BC, logq_BC = _label_log_probs.log_probs(targets, logits_BCV, batch.labels_BT)
      return _label_log_probs.where_present(targets, self._divergence(logp_BC, logq_BC))
    # At each label, the value is that of its span, and the gradient is that of the label's term.
    assert targets.student_logp_BT is not None
    logq_BC = fused_head.label_logp(logits_BCV, batch.labels_BT)
    logq_BC = targets.student_logp_BT + logq_BC - jax.lax.stop_gradient(logq_BC)
    loss_BC = self._divergence(targets.span_logp_BT, logq_BC)
    # The value of a span counts once, at its last label.
    counted_BC = jnp.where(targets.span_left_BT > 1, jax.lax.stop_gradient(loss_BC), 0.0)
    return jnp.where(targets.present(), loss_BC - counted_BC, 0.0)

  def _divergence(self, logp: jax.Array, logq: jax.Array) -> jax.Array:
    logp, logq = (jnp.minimum(x, 0) / self.temperature - EPSILON for x in (logp, logq))
    others = -jnp.expm1(logp) * (jax.nn.log1mexp(-logp) - jax.nn.log1mexp(-logq))
    return self.temperature * (jnp.exp(logp) * (logp - logq) + others)
