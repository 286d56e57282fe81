"""Comparison of models with their teacher by their full next-token distributions."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from distill_jax.losses import DenseTargets
from distill_jax.nn import fused_head, sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.training import token_metrics
from distill_jax.types import Batch, Mean, Model, Output


def compare(
  outputs: Mapping[str, DenseTargets],
  batch: Batch,
  chunk: int,
  vocab_size: int | None = None,
  teacher: str = "teacher",
) -> dict[str, dict[str, Mean]]:
  """Compares every model with the teacher at the labels of a batch.

  Args:
    outputs: The hidden states and head of each model by name, including the teacher.
    batch: The batch.
    chunk: The number of positions per row whose logits are in memory at once.
    vocab_size: The number of tokens or classes; further rows of the heads are padding. None: all
      rows are tokens.
    teacher: The teacher's name.

  Returns:
    The metrics of each model by name, as means over labels, where q is the model's distribution and
    p the teacher's:
      ce: -log q(label), in nats.
      entropy: The entropy of q, in nats.
      accuracy: 1 if the most likely token of q is the label.
      kl: KL(p || q), in nats.
      agreement: 1 if p and q have the same most likely token.
  """

  reference = outputs[teacher]
  assert reference.head_VD is not None

  def chunk_metrics(logits_BCV: jax.Array, piece: Batch) -> dict[str, dict[str, Mean]]:
    rows_BC2 = piece.class_range_BT2
    teacher_BCV = fused_head.cap_and_select(logits_BCV, reference.soft_cap, rows_BC2)
    logp_BCV = jax.nn.log_softmax(teacher_BCV)
    means = {teacher: token_metrics.of_distributions(logp_BCV, logp_BCV, piece)}
    for name, output in piece.targets.items():
      assert isinstance(output, DenseTargets)
      logits_BCV = fused_head.fit_rows(output.logits(), teacher_BCV)
      logq_BCV = jax.nn.log_softmax(logits_BCV)
      means[name] = token_metrics.of_distributions(logp_BCV, logq_BCV, piece)
    return means

  others = {name: output for name, output in outputs.items() if name != teacher}
  batch = batch.with_contrastive_labels() if reference.contrastive else batch
  batch = batch.replace(targets=others)
  hidden_BTD, head_VD = reference.hidden_BTD, reference.head_VD
  return fused_head.fold(
    chunk_metrics, hidden_BTD, head_VD, batch, chunk, vocab_size, seq_axis=sharding.SEQ
  )


def score(model: Model, batch: Batch, compute: ComputeConfig, chunk: int) -> Mean:
  """Computes the mean of -log q(label), to measure the time of a forward pass with its head.

  Args:
    model: The model.
    batch: The batch.
    compute: The compute settings.
    chunk: The number of positions per row whose logits are in memory at once.
  """
  out: Output = model(batch.model_inputs, compute)
  batch = batch.with_contrastive_labels() if out.contrastive else batch

  def ce(logits_BCV: jax.Array, piece: Batch) -> Mean:
    logits_BCV = fused_head.cap_and_select(logits_BCV, out.soft_cap, piece.class_range_BT2)
    return Mean.of(-fused_head.label_logp(logits_BCV, piece.labels_BT), piece.mask_BT)

  return fused_head.fold(ce, out.hidden_BTD, out.head_VD, batch, chunk, seq_axis=sharding.SEQ)
