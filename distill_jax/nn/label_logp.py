"""Log-probabilities of the labels of whole rows, one chunk of positions at a time."""

from __future__ import annotations

import jax

from distill_jax.nn import fused_head, sharding
from distill_jax.types import Batch


def of_rows(
  hidden_BTD: jax.Array,
  head_VD: jax.Array,
  batch: Batch,
  chunk: int,
  vocab_size: int | None = None,
  batch_axes: tuple[str, ...] = sharding.BATCH,
  seq_axis: str | None = None,
  soft_cap: float | None = None,
) -> jax.Array:
  """Returns the log-probability of each label, float32 [B, T], without a gradient.

  It costs one product with the head, and memory for the logits of one chunk. Values at masked
  positions have no meaning.

  Args:
    hidden_BTD: See `fused_head.loss`, as for all further arguments.
    soft_cap: See `fused_head.soft_cap`.
  """

  def of_chunk(logits_BCV: jax.Array, piece: Batch) -> jax.Array:
    logits_BCV = fused_head.cap_and_select(logits_BCV, soft_cap, piece.class_range_BT2)
    return fused_head.label_logp(logits_BCV, piece.labels_BT)

  batch = batch.replace(targets={})
  return fused_head.each(
    of_chunk, hidden_BTD, head_VD, batch, chunk, vocab_size, batch_axes, seq_axis
  )
