"""Next-token quality of language models beside their teacher, from full distributions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from distill_jax.losses import DenseTargets
from distill_jax.nn import fused_head
from distill_jax.nn.layers import ComputeConfig
from distill_jax.training import token_metrics
from distill_jax.types import Batch, Mean, Output


def compare(
  outputs: Mapping[str, DenseTargets],
  batch: Batch,
  chunk: int,
  vocab_size: int | None = None,
  teacher: str = "teacher",
) -> dict[str, dict[str, Mean]]:
  """Every model beside the teacher, over the labels of a batch, in nats.

  Args:
    outputs: hidden states and head of each model by name, the teacher's among them.

  Returns:
    By model: ce, -log q(label); entropy of q; accuracy, q's top token is the label;
    kl, KL(p || q); agreement, p and q have the same top token.
  """

  def chunk_metrics(teacher_BCV: jax.Array, piece: Batch) -> dict[str, dict[str, Mean]]:
    teacher_BCV = fused_head.only_rows(
      fused_head.soft_cap(teacher_BCV, p.soft_cap), piece.class_range_BT2
    )
    logp_BCV = jax.nn.log_softmax(teacher_BCV)
    means = {teacher: token_metrics.of_distributions(logp_BCV, logp_BCV, piece)}
    for name, t in piece.targets.items():
      assert isinstance(t, DenseTargets)
      z_BCV = fused_head.fit_rows(t.logits(), teacher_BCV)
      logq_BCV = jax.nn.log_softmax(z_BCV)
      means[name] = token_metrics.of_distributions(logp_BCV, logq_BCV, piece)
    return means

  p = outputs[teacher]
  assert p.head_VD is not None
  others = {name: t for name, t in outputs.items() if name != teacher}
  batch = (batch.with_contrastive_labels() if p.contrastive else batch).replace(targets=others)
  return fused_head.fold(chunk_metrics, p.hidden_BTD, p.head_VD, batch, chunk, vocab_size)


def score(model: Any, batch: Batch, compute: ComputeConfig, chunk: int) -> Mean:
  """-log q(label) alone: the work of a forward pass over a prompt, for timing."""
  out: Output = model(batch.inputs, compute)
  batch = batch.with_contrastive_labels() if out.contrastive else batch

  def ce(z_BCV: jax.Array, piece: Batch) -> Mean:
    z_BCV = fused_head.only_rows(fused_head.soft_cap(z_BCV, out.soft_cap), piece.class_range_BT2)
    return Mean.of(-fused_head.logp_at(z_BCV, piece.labels_BT[..., None])[..., 0], piece.mask_BT)

  return fused_head.fold(ce, out.hidden_BTD, out.head_VD, batch, chunk)
