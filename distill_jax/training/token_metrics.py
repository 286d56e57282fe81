"""Metrics per token: cross-entropy, entropy, KL and agreement with a teacher.

`means` is for training: it does not allocate further arrays of the size of the vocabulary, and
has the same metrics for recorded and online teachers. `of_distributions` is for evaluation, and
compares full distributions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from distill_jax.losses import DenseTargets, LabelTargets, SampledTargets, SpanTargets, divergences
from distill_jax.nn import fused_head
from distill_jax.types import Batch, Mean, Targets


def means(
  logits_BCV: jax.Array, piece: Batch, first_classes: tuple[tuple[str, int], ...] = ()
) -> dict[str, Mean]:
  """Returns means over the labels of a chunk, in nats.

  Args:
    logits_BCV: The student's logits.
    piece: Labels, mask and targets of the chunk.
    first_classes: Name and first row of the head of each task, if there are several.

  Returns:
    "ce" and "entropy" of the student. For each teacher, as "METRIC/TEACHER" and as far as its
    targets allow: "kl" at temperature 1, or "kl_at_TEMPERATURE" at the recorded temperature;
    "teacher_ce"; "teacher_entropy"; and "agreement", the fraction of labels where both have the
    same most probable token. For each of several tasks: "ce/TASK" and "accuracy/TASK".
  """
  lse_BC = fused_head.log_sum_exp(logits_BCV)[..., 0]
  label_BC = fused_head.label_logit(logits_BCV, piece.labels_BT)
  ce_BC, mask_BC = lse_BC - label_BC, piece.mask_for_label_losses()
  out = {
    "ce": Mean.of(ce_BC, mask_BC),
    "entropy": Mean.of(fused_head.entropy(logits_BCV), mask_BC),
  }
  for name, first in first_classes:
    assert piece.class_range_BT2 is not None
    of_task_BC = mask_BC & (piece.class_range_BT2[..., 0] == first)
    correct_BC = label_BC >= jnp.max(logits_BCV, -1)
    out[f"ce/{name}"] = Mean.of(ce_BC, of_task_BC)
    out[f"accuracy/{name}"] = Mean.of(correct_BC, of_task_BC)
  for name, targets in piece.targets.items():
    # Text in a mixture with sampled records has no entries.
    mask_BC, present_BC = piece.mask_for_teacher_losses(), targets.present()
    mask_BC = mask_BC if present_BC is None else mask_BC & present_BC
    for key, x_BC in _by_teacher(targets, logits_BCV, piece).items():
      out[f"{key}/{name}"] = Mean.of(x_BC, mask_BC)
  return out


def of_distributions(logp_BCV: jax.Array, logq_BCV: jax.Array, piece: Batch) -> dict[str, Mean]:
  """Returns means over the labels of a chunk, for a model q and its teacher p, in nats.

  Args:
    logp_BCV: The teacher's log-probabilities of all tokens; -inf in padding rows.
    logq_BCV: The model's log-probabilities of all tokens; -inf in padding rows.
    piece: Labels and mask of the chunk.

  Returns:
    "ce", "entropy" and "accuracy" of q; "kl", KL(p || q); and "agreement", the fraction of labels
    where p and q have the same most probable token.
  """
  top_BC, q_BCV = jnp.argmax(logq_BCV, -1), jnp.exp(logq_BCV)
  values = {
    "ce": -jnp.take_along_axis(logq_BCV, piece.labels_BT[..., None], -1)[..., 0],
    "entropy": -jnp.sum(q_BCV * jnp.where(q_BCV > 0, logq_BCV, 0), -1),
    "accuracy": top_BC == piece.labels_BT,
    "kl": kl_of_distributions(logp_BCV, logq_BCV),
    "agreement": top_BC == jnp.argmax(logp_BCV, -1),
  }
  return {name: Mean.of(x_BC, piece.mask_BT) for name, x_BC in values.items()}


def kl_of_distributions(logp: jax.Array, logq: jax.Array) -> jax.Array:
  """Returns KL(p || q) over the last axis, where padding rows are -inf in both."""
  is_real = logp > -jnp.inf
  safe = (jnp.where(is_real, x, 0) for x in (logp, logq))
  return jnp.sum(jnp.where(is_real, divergences.forward_kl(*safe), 0), -1)


def _by_teacher(targets: Targets, logits_BCV: jax.Array, piece: Batch) -> dict[str, jax.Array]:
  """Returns the metrics of the student against one teacher."""
  if isinstance(targets, SpanTargets):  # their sum over labels is that over spans
    return {"teacher_ce": -jnp.where(targets.span_left_BT == 1, targets.span_logp_BT, 0.0)}
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
  teacher_BCV = targets.aligned_logits(logits_BCV)
  return {
    "teacher_ce": -fused_head.label_logp(teacher_BCV, piece.labels_BT),
    "teacher_entropy": fused_head.entropy(teacher_BCV),
    "agreement": jnp.any(_is_top(teacher_BCV) & _is_top(logits_BCV), -1),
  }


def _recorded(targets: Targets, logits_BCV: jax.Array) -> dict[str, jax.Array]:
  metrics = {}
  if targets.label_logp_BT is not None and targets.temperature == 1:
    metrics["teacher_ce"] = -targets.label_logp_BT
  if targets.entropy_BT is not None and targets.temperature == 1:
    metrics["teacher_entropy"] = targets.entropy_BT
  if targets.argmax_BT is not None:
    # argmax would be ten times slower than a maximum on CPU.
    at_top_BC = jnp.take_along_axis(logits_BCV, targets.argmax_BT[..., None], -1)[..., 0]
    metrics["agreement"] = at_top_BC >= jnp.max(logits_BCV, -1)
  return metrics


def _kl(targets: Targets, logits_BCV: jax.Array) -> jax.Array | None:
  """Returns KL(p || q) at the temperature of the targets, or None if they do not allow it."""
  if isinstance(targets, LabelTargets):
    return None
  if isinstance(targets, SampledTargets):
    has_entropy = targets.entropy_BT is not None
    return targets.forward_kl(logits_BCV, targets.temperature) if has_entropy else None
  return targets.forward_kl(logits_BCV, 1.0) if targets.temperature == 1 else None


def _is_top(logits_BCV: jax.Array) -> jax.Array:
  return logits_BCV == jnp.max(logits_BCV, -1, keepdims=True)
