"""Metrics of every token: cross-entropy, entropy, KL and agreement with a teacher.

In training they are computed from the student's logits, without further arrays of the
vocabulary's size, and are the same for recorded and online teachers (`means`). Evaluation
compares whole distributions (`of_distributions`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from distill_jax.losses import DenseTargets, SampledTargets, divergences
from distill_jax.nn import fused_head
from distill_jax.types import Batch, Mean, Targets


def means(
  logits_BCV: jax.Array, piece: Batch, first_classes: tuple[tuple[str, int], ...] = ()
) -> dict[str, Mean]:
  """Means over a chunk's labels, in nats.

  Args:
    logits_BCV: the student's.
    piece: the chunk's labels, mask and targets.
    first_classes: of several tasks, each one's name and its first row of the head.

  Returns:
    ce, entropy: of the student. By teacher, as far as its targets hold them: kl (at a temperature
    of 1, or at the recorded one under the name kl_at_TEMPERATURE), teacher_ce, teacher_entropy,
    agreement (both have the same most probable token). By task: ce, and accuracy.
  """
  lse_BC = fused_head.log_sum_exp(logits_BCV)[..., 0]
  label_BC = jnp.take_along_axis(logits_BCV, piece.labels_BT[..., None], -1)[..., 0]
  ce_BC, mask_BC = lse_BC - label_BC, piece.mask_for_label_losses()
  out = {
    "ce": Mean.of(ce_BC, mask_BC),
    "entropy": Mean.of(lse_BC - _mean_logit(logits_BCV, lse_BC), mask_BC),
  }
  for name, first in first_classes:
    assert piece.class_range_BT2 is not None
    of_task_BC = mask_BC & (piece.class_range_BT2[..., 0] == first)
    correct_BC = label_BC >= jnp.max(logits_BCV, -1)
    out[f"ce/{name}"] = Mean.of(ce_BC, of_task_BC)
    out[f"accuracy/{name}"] = Mean.of(correct_BC, of_task_BC)
  for name, targets in piece.targets.items():
    # Text among sampled records has no entries: no teacher has read it.
    mask_BC, present_BC = piece.mask_for_teacher_losses(), targets.present()
    mask_BC = mask_BC if present_BC is None else mask_BC & present_BC
    for key, x_BC in _by_teacher(targets, logits_BCV, piece).items():
      out[f"{key}/{name}"] = Mean.of(x_BC, mask_BC)
  return out


def of_distributions(logp_BCV: jax.Array, logq_BCV: jax.Array, piece: Batch) -> dict[str, Mean]:
  """Means over a chunk's labels of a model q beside its teacher p, in nats.

  Args:
    logp_BCV, logq_BCV: log-probabilities of all tokens; -inf past the vocabulary.

  Returns:
    ce, entropy and accuracy of q; kl, KL(p || q); agreement, p and q have the same most probable
    token.
  """
  top_BC, q_BCV = jnp.argmax(logq_BCV, -1), jnp.exp(logq_BCV)
  real_BCV = logp_BCV > -jnp.inf  # rows past the vocabulary have no probability
  safe = (jnp.where(real_BCV, x, 0) for x in (logp_BCV, logq_BCV))
  values = {
    "ce": -jnp.take_along_axis(logq_BCV, piece.labels_BT[..., None], -1)[..., 0],
    "entropy": -jnp.sum(q_BCV * jnp.where(q_BCV > 0, logq_BCV, 0), -1),
    "accuracy": top_BC == piece.labels_BT,
    "kl": jnp.sum(jnp.where(real_BCV, divergences.forward_kl(*safe), 0), -1),
    "agreement": top_BC == jnp.argmax(logp_BCV, -1),
  }
  return {name: Mean.of(x_BC, piece.mask_BT) for name, x_BC in values.items()}


def _by_teacher(targets: Targets, logits_BCV: jax.Array, piece: Batch) -> dict[str, jax.Array]:
  """The student beside one teacher."""
  if isinstance(targets, DenseTargets):
    metrics = _online(targets, logits_BCV, piece)
  else:
    metrics = _recorded(targets, logits_BCV)
  kl_BC = _kl(targets, logits_BCV)
  if kl_BC is not None:
    temperature = targets.temperature
    metrics["kl" if temperature == 1 else f"kl_at_{temperature:g}"] = kl_BC
  return metrics


def _online(targets: DenseTargets, logits_BCV: jax.Array, piece: Batch) -> dict[str, jax.Array]:
  logp_BCV, _ = targets.log_probs(logits_BCV)
  lse_BC = fused_head.log_sum_exp(logp_BCV)[..., 0]  # 0 up to rounding
  label_BC = jnp.take_along_axis(logp_BCV, piece.labels_BT[..., None], -1)[..., 0]
  return {
    "teacher_ce": lse_BC - label_BC,
    "teacher_entropy": lse_BC - _mean_logit(logp_BCV, lse_BC),
    "agreement": jnp.any(_is_top(logp_BCV) & _is_top(logits_BCV), -1),
  }


def _recorded(targets: Targets, logits_BCV: jax.Array) -> dict[str, jax.Array]:
  metrics = {}
  if targets.label_logp_BT is not None and targets.temperature == 1:
    metrics["teacher_ce"] = -targets.label_logp_BT
  if targets.entropy_BT is not None and targets.temperature == 1:
    metrics["teacher_entropy"] = targets.entropy_BT
  if targets.argmax_BT is not None:
    # Not argmax, which is ten times slower on a CPU than a maximum.
    at_top_BC = jnp.take_along_axis(logits_BCV, targets.argmax_BT[..., None], -1)[..., 0]
    metrics["agreement"] = at_top_BC >= jnp.max(logits_BCV, -1)
  return metrics


def _kl(targets: Targets, logits_BCV: jax.Array) -> jax.Array | None:
  """KL(p || q) at the temperature of the targets; None where they do not allow it."""
  if isinstance(targets, SampledTargets):
    has_entropy = targets.entropy_BT is not None
    return targets.forward_kl(logits_BCV, targets.temperature) if has_entropy else None
  return targets.forward_kl(logits_BCV, 1.0) if targets.temperature == 1 else None


def _is_top(logits_BCV: jax.Array) -> jax.Array:
  return logits_BCV == jnp.max(logits_BCV, -1, keepdims=True)


def _mean_logit(logits_BCV: jax.Array, lse_BC: jax.Array) -> jax.Array:
  """sum_i q_i z_i, without rows of -inf."""
  q_BCV = jnp.exp(logits_BCV - lse_BC[..., None])
  return jnp.sum(jnp.where(q_BCV > 0, q_BCV * logits_BCV, 0), -1)
