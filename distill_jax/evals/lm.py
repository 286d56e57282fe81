"""Next-token quality of a language model beside its teacher, from full distributions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import head
from distill_jax.layers import Compute
from distill_jax.types import Batch, Mean, Output


def measure(model: Any, batch: Batch, how: Compute, chunk: int) -> dict[str, Mean]:
  """Means over the labels of a batch, in nats.

  Args:
    batch: `targets["teacher"]` is online (hidden states and head), so that every number is
      exact; without it only the student's own are given.

  Returns:
    ce: -log q(label). entropy: of q. accuracy: q's top token is the label.
    kl: KL(p || q). agreement: p and q have the same top token.
  """
  out: Output = model(batch.inputs, how)

  def chunk_metrics(logits_BCV: jax.Array, piece: Batch) -> dict[str, Mean]:
    logq_BCV = jax.nn.log_softmax(logits_BCV)
    top_BC = jnp.argmax(logits_BCV, -1)
    per_token = {
      "ce": -jnp.take_along_axis(logq_BCV, piece.labels_BT[..., None], -1)[..., 0],
      "entropy": -jnp.sum(jnp.exp(logq_BCV) * logq_BCV, -1),
      "accuracy": top_BC == piece.labels_BT,
    }
    if "teacher" in piece.targets:
      teacher = piece.targets["teacher"]
      assert teacher.hidden_BTD is not None and teacher.head_VD is not None
      teacher_BCV = head.logits(teacher.hidden_BTD, teacher.head_VD)
      logp_BCV = jax.nn.log_softmax(teacher_BCV)
      per_token["kl"] = jnp.sum(jnp.exp(logp_BCV) * (logp_BCV - logq_BCV), -1)
      per_token["agreement"] = top_BC == jnp.argmax(teacher_BCV, -1)
    return {name: Mean.of(x_BC, piece.mask_BT) for name, x_BC in per_token.items()}

  return head.fold(chunk_metrics, out.hidden_BTD, out.head_VD, batch, chunk)


def score(model: Any, batch: Batch, how: Compute, chunk: int) -> Mean:
  """-log q(label) alone: the work of a forward pass over a prompt, for timing."""
  out: Output = model(batch.inputs, how)
  ce = lambda z_BCV, piece: Mean.of(
    -head.logp_at(z_BCV, piece.labels_BT[..., None])[..., 0], piece.mask_BT
  )
  return head.fold(ce, out.hidden_BTD, out.head_VD, batch, chunk)
