"""Log-probabilities of the labels of whole rows, one chunk of positions at a time."""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec as P

from distill_jax.nn import chunks, fused_head, head_chunks, sharding
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
  batch = batch.replace(targets={})

  def scan(hidden_BTD, head_VD, batch, sum_over_batch):
    del sum_over_batch
    pieces = head_chunks.split(hidden_BTD, batch, chunk)

    def of_chunk(_, xs):
      hidden_BCD, piece = xs
      with jax.named_scope("head"):
        logits_BCV = fused_head.logits(hidden_BCD, head_VD, vocab_size)
        logits_BCV = fused_head.cap_and_select(logits_BCV, soft_cap, piece.class_range_BT2)
        return None, fused_head.label_logp(logits_BCV, piece.labels_BT)

    _, logp_nBC = jax.lax.scan(of_chunk, None, (pieces.hidden_nBCD, pieces.batch))
    return chunks.join(logp_nBC, hidden_BTD.shape[1])

  hidden_BTD, head_VD = jax.lax.stop_gradient((hidden_BTD, head_VD))
  out = P(batch_axes, seq_axis)
  return head_chunks.per_shard(scan, out, batch_axes, seq_axis, hidden_BTD, head_VD, batch)
