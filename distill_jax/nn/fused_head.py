"""The fused vocabulary head: logits are in memory for one chunk of positions at a time.

A loss over the vocabulary is a sum over positions. Its scale, the loss weights and the token count,
is known before the forward pass. So the gradient of each chunk is computed in the forward pass,
right after its logits. This takes three matrix products, as without chunks, computes nothing twice,
and needs no memory proportional to positions times vocabulary. A head that is not differentiated
takes two products, and no array of its size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P

from distill_jax.nn import chunks, head_blocks, head_chunks, mesh_in_use, sharding
from distill_jax.nn.head_chunks import HeadChunks, SumOverBatch
from distill_jax.nn.logits import (
  cap_and_select,
  entropy,
  fit_rows,
  kl,
  label_logit,
  label_logp,
  log_sum_exp,
  logits,
  logp_at,
  only_rows,
  soft_cap,
)
from distill_jax.nn.sharding import MeshAxes
from distill_jax.types import Batch, PyTree

__all__ = [
  "cap_and_select",
  "each",
  "entropy",
  "fit_rows",
  "fold",
  "kl",
  "label_logit",
  "label_logp",
  "log_sum_exp",
  "logits",
  "logp_at",
  "loss",
  "only_rows",
  "soft_cap",
]

# (logits_BCV float32, a chunk of the batch) -> a tree of arrays that are summed over chunks.
ChunkFn = Callable[[jax.Array, Batch], PyTree]
# (logits_BCV float32, a chunk of the batch) -> (loss, metrics). The loss is a scalar, which is
# differentiated; the metrics are a tree of arrays. Both are summed over chunks, which on CPUs are
# divided further: [1, some of the B * C positions, V].
ChunkLossFn = Callable[[jax.Array, Batch], tuple[jax.Array, PyTree]]
_float32_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def fold(
  chunk_fn: ChunkFn,
  hidden_BTD: jax.Array,
  head_VD: jax.Array,
  batch: Batch,
  chunk: int,
  vocab_size: int | None = None,
  batch_axes: tuple[str, ...] = sharding.BATCH,
  seq_axis: str | None = None,
) -> PyTree:
  """Returns the sum of `chunk_fn(logits_BCV, chunk of the batch)` over chunks, for metrics.

  Args:
    chunk_fn: (logits_BCV float32, chunk of the batch) -> a tree of arrays, which are summed.
    hidden_BTD: see `loss`, as for all further arguments. To differentiate the sum, use `loss`.
  """
  scan = functools.partial(_scan_values, chunk_fn, chunk, vocab_size)
  return head_chunks.per_shard(scan, P(), batch_axes, seq_axis, hidden_BTD, head_VD, batch)


def each(
  chunk_fn: ChunkFn,
  hidden_BTD: jax.Array,
  head_VD: jax.Array,
  batch: Batch,
  chunk: int,
  vocab_size: int | None = None,
  batch_axes: tuple[str, ...] = sharding.BATCH,
  seq_axis: str | None = None,
) -> PyTree:
  """Returns `chunk_fn(logits_BCV, chunk of the batch)` at all positions, without a gradient.

  Values at masked positions have no meaning.

  Args:
    chunk_fn: (logits_BCV float32, chunk of the batch) -> a tree of arrays [B, C, ...]. The arrays
      of the result are [B, T, ...].
    hidden_BTD: see `loss`, as for all further arguments.
  """

  def scan(hidden_BTD, head_VD, batch, sum_over_batch):
    del sum_over_batch
    pieces = head_chunks.split(hidden_BTD, batch, chunk)

    def of_chunk(_, xs):
      hidden_BCD, piece = xs
      with jax.named_scope("head"):
        return None, chunk_fn(logits(hidden_BCD, head_VD, vocab_size), pieces.with_logits(piece))

    _, values = jax.lax.scan(of_chunk, None, (pieces.hidden_nBCD, pieces.batch))
    return jax.tree.map(lambda x_nBC: chunks.join(x_nBC, hidden_BTD.shape[1]), values)

  hidden_BTD, head_VD = jax.lax.stop_gradient((hidden_BTD, head_VD))
  out = P(batch_axes, seq_axis)
  return head_chunks.per_shard(scan, out, batch_axes, seq_axis, hidden_BTD, head_VD, batch)


def loss(
  loss_fn: ChunkLossFn,
  hidden_BTD: jax.Array,
  head_VD: jax.Array,
  batch: Batch,
  chunk: int,
  vocab_size: int | None = None,
  batch_axes: tuple[str, ...] = sharding.BATCH,
  seq_axis: str | None = None,
  vocab_axis: MeshAxes = sharding.VOCAB,
  embed_axis: MeshAxes = None,
) -> tuple[jax.Array, PyTree]:
  """Sums a loss over chunks, and computes its gradient in the forward pass.

  The sum is not divided by a token count. `loss_fn` multiplies each loss by its weight and divides
  it by the number of tokens of the global batch, i.e. of all devices and microbatches, not of this
  chunk or device. The caller counts these tokens first, as training.step does.

  On a mesh set with `jax.set_mesh`, each device processes its part of the positions and sequences,
  and results are summed over `batch_axes` and `seq_axis` once, at the end.

  Args:
    loss_fn: see ChunkLossFn. The loss is weighted and divided as described above.
    hidden_BTD: the hidden states after the final norm, float32 or bfloat16.
    head_VD: the unembedding, in the same dtype.
    batch: labels, mask and targets. Masked positions may hold any value, NaN included.
    chunk: the number of positions of each sequence in a chunk. It need not divide T.
    vocab_size: the number of rows of the head that are not padding; None for all.
    batch_axes: the mesh axes over which sequences are sharded.
    seq_axis: the mesh axis over which positions are sharded; None if they are not.
    vocab_axis: the mesh axes over which the rows of the head are sharded; None if they are not.
    embed_axis: the mesh axes over which the columns of the head are stored. The head's gradient is
      reduce-scattered over those of them that are in `batch_axes` or `seq_axis`, if the width is
      divisible. None if columns are not sharded: every device computes the whole sum.

  Returns:
    (total loss, metrics), float32. The total is differentiable with respect to hidden_BTD and
    head_VD, the metrics are not. The gradient of the head is summed in float32, and is computed
    only if the head is differentiated.

  Raises:
    InputError: the mesh lacks one of the axes, has Explicit ones, or is set by `with mesh:`.
  """

  @jax.custom_vjp
  def total_loss(hidden_BTD, head_VD):
    return fold(loss_fn, hidden_BTD, head_VD, batch, chunk, vocab_size, batch_axes, seq_axis)

  def forward(hidden_BTD, head_VD):
    head_is_trained, head_VD = head_VD.perturbed, head_VD.value
    shards = mesh_in_use.spread(vocab_axis, "vocab_axis")
    scan = functools.partial(_scan_gradients, loss_fn, chunk, vocab_size, shards, head_is_trained)
    parts = P(head_chunks.position_axes(batch_axes, seq_axis))
    out_specs = (P(), parts, P(batch_axes, seq_axis))
    sums, head_grad_sVD, hidden_grad_BTD = head_chunks.per_shard(
      scan, out_specs, batch_axes, seq_axis, hidden_BTD.value, head_VD, batch
    )
    head_grad_VD = None
    if head_grad_sVD is not None:
      where = (batch_axes, seq_axis, vocab_axis, embed_axis)
      head_grad_VD = head_chunks.sum_parts(head_grad_sVD, *where).astype(head_VD.dtype)
    return sums, (hidden_grad_BTD, head_grad_VD)

  def backward(grads, cotangents):
    loss_cotangent, _ = cotangents  # metrics have no gradient
    if isinstance(loss_cotangent, SymbolicZero):  # only metrics are differentiated
      return None, None
    return jax.tree.map(lambda grad: (grad * loss_cotangent).astype(grad.dtype), grads)

  total_loss.defvjp(forward, backward, symbolic_zeros=True)
  return total_loss(hidden_BTD, head_VD)


def pull_back(
  grad_BCV: jax.Array, hidden_BCD: jax.Array, head_VD: jax.Array, head_grad_VD: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the gradient of a chunk's hidden states, and the head's with that of the chunk added.

  Args:
    grad_BCV: The gradient of the chunk's logits.
    hidden_BCD: The chunk's hidden states.
    head_VD: The unembedding.
    head_grad_VD: The sum over the chunks before, float32.
  """
  hidden_grad_BCD = _float32_dot("BCV,VD->BCD", grad_BCV, head_VD).astype(head_VD.dtype)
  return hidden_grad_BCD, head_grad_VD + _float32_dot("BCV,BCD->VD", grad_BCV, hidden_BCD)


def _scan_values(
  chunk_fn: ChunkFn,
  chunk: int,
  vocab_size: int | None,
  hidden_BTD: jax.Array,
  head_VD: jax.Array,
  batch: Batch,
  sum_over_batch: SumOverBatch,
) -> PyTree:
  """Computes `fold` for one device's positions."""
  pieces = head_chunks.split(hidden_BTD, batch, chunk)

  def value_of(hidden_BCD, piece):
    with jax.named_scope("head"):
      return chunk_fn(logits(hidden_BCD, head_VD, vocab_size), pieces.with_logits(piece))

  def add_chunk(sums, xs):
    return jax.tree.map(jnp.add, sums, value_of(*xs)), None

  zero = _zeros_like_result(value_of, pieces)
  sums, _ = jax.lax.scan(add_chunk, zero, (pieces.hidden_nBCD, pieces.batch))
  return sum_over_batch(sums)


def _scan_gradients(
  loss_fn: ChunkLossFn,
  chunk: int,
  vocab_size: int | None,
  shards: int,
  head_is_trained: bool,
  hidden_BTD: jax.Array,
  head_VD: jax.Array,
  batch: Batch,
  sum_over_batch: SumOverBatch,
) -> tuple[tuple[jax.Array, PyTree], jax.Array | None, jax.Array]:
  """Computes `loss` and its gradients for one device's positions.

  The scan over chunks carries two sums and outputs a gradient for each chunk:

    chunk i -> logits -> loss_fn -+-> (loss, metrics)              added to `sums`
                                  |
                                  +-> gradient of the logits
                                        times hidden states        added to `head_grad_VD`
                                        times the head             stored in hidden_grad_nBCD[i]

  Returns:
    ((loss, metrics), gradient of the head [1, V, D] float32, gradient of the hidden states
    [B, T, D]). The first is a sum over all devices' positions, the others are those of this
    device's positions. Without `head_is_trained` the gradient of the head is None everywhere.
  """
  pieces = head_chunks.split(hidden_BTD, batch, chunk)

  def add_loss(sums, logits_BCV, piece):
    """Returns ((loss, metrics) with those of a chunk added, the gradient of its logits)."""
    value, pull, metrics = jax.vjp(lambda z_BCV: loss_fn(z_BCV, piece), logits_BCV, has_aux=True)
    grad_BCV = pull(jnp.ones_like(value))[0].astype(head_VD.dtype)
    return jax.tree.map(jnp.add, sums, (value, metrics)), grad_BCV

  def in_cache(cpu: Callable[..., PyTree], other: Callable[..., PyTree], *args: PyTree) -> PyTree:
    """Calls `cpu` on a CPU that holds the whole vocabulary, otherwise the equivalent `other`."""
    return other(*args) if shards > 1 else jax.lax.platform_dependent(*args, cpu=cpu, default=other)

  def add_chunk(carry, xs):
    (sums, head_grad_VD), (hidden_BCD, piece) = carry, xs
    with jax.named_scope("head"):
      logits_BCV = logits(hidden_BCD, head_VD, vocab_size)
      piece = pieces.with_logits(piece)
      by_rows = functools.partial(head_blocks.by_rows, add_loss)
      sums, grad_BCV = in_cache(by_rows, add_loss, sums, logits_BCV, piece)
      if head_grad_VD is None:
        hidden_grad_BCD = _float32_dot("BCV,VD->BCD", grad_BCV, head_VD).astype(head_VD.dtype)
      else:
        args = (grad_BCV, hidden_BCD, head_VD, head_grad_VD)
        hidden_grad_BCD, head_grad_VD = in_cache(head_blocks.pull_back, pull_back, *args)
    return (sums, head_grad_VD), hidden_grad_BCD

  def value_of(hidden_BCD, piece):
    return loss_fn(logits(hidden_BCD, head_VD, vocab_size), pieces.with_logits(piece))

  zero_VD = jnp.zeros(head_VD.shape, jnp.float32) if head_is_trained else None
  carry = _zeros_like_result(value_of, pieces), zero_VD
  carry, hidden_grad_nBCD = jax.lax.scan(add_chunk, carry, (pieces.hidden_nBCD, pieces.batch))
  sums, head_grad_VD = carry
  head_grad_1VD = None if head_grad_VD is None else head_grad_VD[None]
  # Sums over devices are computed once per pass, not once per chunk.
  return sum_over_batch(sums), head_grad_1VD, chunks.join(hidden_grad_nBCD, hidden_BTD.shape[1])


def _zeros_like_result(fn: Callable[[jax.Array, Batch], PyTree], pieces: HeadChunks) -> PyTree:
  """Returns zeros with the shapes and dtypes of the result of `fn(hidden, batch)` for a chunk."""
  first = jax.tree.map(lambda x: x[0], (pieces.hidden_nBCD, pieces.batch))
  shapes = jax.eval_shape(fn, *first)
  return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
