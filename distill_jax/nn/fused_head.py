"""The fused vocabulary head: logits exist for one chunk of positions at a time.

A loss over the vocabulary is a sum over positions, and the weights and the token count that
scale it are known before it starts. So the gradient of each chunk is pulled back at once,
in the forward pass: three matrix products, as without chunks, nothing computed twice, and
memory that does not grow with positions times vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from distill_jax.errors import InputError
from distill_jax.nn import chunks, sharding
from distill_jax.nn.logits import (
  cap_and_select,
  fit_rows,
  label_logp,
  log_sum_exp,
  logits,
  logp_at,
  only_rows,
  soft_cap,
)
from distill_jax.types import Batch, PyTree

__all__ = [
  "cap_and_select",
  "fit_rows",
  "fold",
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
# The same for losses: (loss, metrics), of which the first is a scalar and is differentiated.
ChunkLossFn = Callable[[jax.Array, Batch], tuple[jax.Array, PyTree]]
SumOverBatch = Callable[[PyTree], PyTree]  # sums a tree over the devices that hold other sequences

BLOCK_BYTES = 2**23  # of the head's gradient, as much as one product makes


def fold(
  chunk_fn: ChunkFn,
  hidden_BTD: jax.Array,
  head_VD: jax.Array,
  batch: Batch,
  chunk: int,
  vocab_size: int | None = None,
  batch_axes: tuple[str, ...] = sharding.BATCH,
) -> PyTree:
  """Sums `chunk_fn(logits_BCV, chunk of the batch)` over chunks, with no gradient: for metrics.

  Args: as of `loss`, but that `chunk_fn` returns any tree of arrays that are summed.
  """
  scan = functools.partial(_scan_values, chunk_fn, chunk, vocab_size)
  return _per_batch_shard(scan, P(), batch_axes, hidden_BTD, head_VD, batch)


def loss(
  loss_fn: ChunkLossFn,
  hidden_BTD: jax.Array,
  head_VD: jax.Array,
  batch: Batch,
  chunk: int,
  vocab_size: int | None = None,
  batch_axes: tuple[str, ...] = sharding.BATCH,
  vocab_axis: str = sharding.VOCAB,
) -> tuple[jax.Array, PyTree]:
  """Sums a loss over chunks; its gradient is ready when the forward pass ends.

  Nothing is averaged here. `loss_fn` weighs each loss and divides it by the number of tokens of
  the global batch: of all devices and microbatches, not of this chunk or this device. Whoever
  calls this counts them first, as training.step does.

  On a mesh (under `jax.set_mesh`) each device works on its own sequences, and sums are taken
  over `batch_axes` once, at the end. Under `with mesh:` alone no mesh is seen.

  Args:
    loss_fn: (logits_BCV float32, chunk of the batch) -> (loss, metrics): a scalar, weighed and
      divided as above, and a tree that merges by addition.
    hidden_BTD: after the final norm, float32 or bfloat16.
    head_VD: the unembedding, in the same dtype.
    batch: labels, mask and targets; masked positions may hold anything, NaN included.
    chunk: positions of each sequence at once; it need not divide T.
    vocab_size: rows of the head from here on are padding.
    batch_axes: the mesh axes over which sequences are spread.
    vocab_axis: the mesh axis over which the head's rows are spread.

  Returns:
    (total loss, metrics), float32. The total is differentiable in hidden_BTD and head_VD,
    the metrics are not. The gradient of the head is summed in float32.

  Raises:
    InputError: the mesh lacks one of the axes.
  """

  @jax.custom_vjp
  def total_loss(hidden_BTD, head_VD):
    return fold(loss_fn, hidden_BTD, head_VD, batch, chunk, vocab_size, batch_axes)

  def forward(hidden_BTD, head_VD):
    shards = _mesh_size((vocab_axis,), "vocab_axis")
    scan = functools.partial(_scan_gradients, loss_fn, chunk, vocab_size, shards)
    out_specs = (P(), P(), P(batch_axes))
    sums, head_grad_VD, hidden_grad_BTD = _per_batch_shard(
      scan, out_specs, batch_axes, hidden_BTD, head_VD, batch
    )
    return sums, (hidden_grad_BTD, head_grad_VD.astype(head_VD.dtype))

  def backward(grads, cotangents):
    loss_cotangent, _ = cotangents  # metrics have no gradient
    return jax.tree.map(lambda grad: (grad * loss_cotangent).astype(grad.dtype), grads)

  total_loss.defvjp(forward, backward)
  return total_loss(hidden_BTD, head_VD)


def _scan_values(
  chunk_fn: ChunkFn,
  chunk: int,
  vocab_size: int | None,
  hidden_BTD: jax.Array,
  head_VD: jax.Array,
  batch: Batch,
  sum_over_batch: SumOverBatch,
) -> PyTree:
  """`fold` of one device's sequences."""
  pieces = _split(hidden_BTD, batch, chunk)

  def value_of(hidden_BCD, piece):
    with jax.named_scope("head"):
      return chunk_fn(logits(hidden_BCD, head_VD, vocab_size), pieces.with_heads(piece))

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
  hidden_BTD: jax.Array,
  head_VD: jax.Array,
  batch: Batch,
  sum_over_batch: SumOverBatch,
) -> tuple[tuple[jax.Array, PyTree], jax.Array, jax.Array]:
  """`loss` of one device's sequences, and its gradients.

  Returns: ((loss, metrics), the head's gradient [V, D] float32, the hidden states' [B, T, D]).
  The first two are of all devices' sequences, the last of this device's own.

  The scan over chunks carries two sums and gives out a gradient for each chunk:

    chunk i -> logits -> loss_fn -+-> (loss, metrics)              added to `sums`
                                  |
                                  +-> gradient of the logits
                                        times hidden states        added to `head_grad_svD`
                                        times the head             is hidden_grad_nBCD[i]
  """
  pieces = _split(hidden_BTD, batch, chunk)
  head_svD, blocks = _shards_and_blocks(head_VD, shards)

  def value_and_grad(hidden_BCD, piece):
    """((loss, metrics), the gradient of the logits) of a chunk."""
    with jax.named_scope("head"):
      logits_BCV = logits(hidden_BCD, head_VD, vocab_size)
      value, pull, metrics = jax.vjp(
        lambda z_BCV: loss_fn(z_BCV, pieces.with_heads(piece)), logits_BCV, has_aux=True
      )
      grad_BCV = pull(jnp.ones_like(value))[0].astype(head_VD.dtype)
    return (value, metrics), grad_BCV

  def add_chunk(carry, xs):
    (sums, head_grad_svD), (hidden_BCD, piece) = carry, xs
    chunk_sums, grad_BCV = value_and_grad(hidden_BCD, piece)
    with jax.named_scope("head"):
      hidden_grad_BCD, head_grad_svD = _pull_back(
        grad_BCV, hidden_BCD, head_svD, head_grad_svD, blocks
      )
    return (jax.tree.map(jnp.add, sums, chunk_sums), head_grad_svD), hidden_grad_BCD

  zero_sums = _zeros_like_result(lambda *xs: value_and_grad(*xs)[0], pieces)
  carry = zero_sums, jnp.zeros(head_svD.shape, jnp.float32)
  carry, hidden_grad_nBCD = jax.lax.scan(add_chunk, carry, (pieces.hidden_nBCD, pieces.batch))
  sums, head_grad_svD = carry
  # Summed over the devices that share the head once a pass, not once a chunk.
  sums, head_grad_VD = sum_over_batch((sums, head_grad_svD.reshape(head_VD.shape)))
  return sums, head_grad_VD, chunks.join(hidden_grad_nBCD, hidden_BTD.shape[1])


def _mesh_size(axes: tuple[str, ...], argument: str) -> int:
  """Over how many devices of the mesh in use these axes spread an array; 1 without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return 1
  if missing := [axis for axis in axes if axis not in mesh.shape]:
    raise InputError(
      f"{argument} is {axes} and the mesh has axes {mesh.axis_names}, among which is no "
      f"{missing[0]!r}. Name axes of the mesh."
    )
  return math.prod(mesh.shape[axis] for axis in axes)


def _shards_and_blocks(head_VD: jax.Array, shards: int) -> tuple[jax.Array, int]:
  """The head as [s, v, D], one entry for each device that may hold a part, and blocks of a part.

  A block is what `_pull_back` makes of the head's gradient at once; blocks divide v.
  """
  V, D = head_VD.shape
  shards = 1 if V % shards else shards
  rows = V // shards
  max_blocks = -(-rows * D * 4 // BLOCK_BYTES)
  blocks = max(n for n in range(1, max_blocks + 1) if rows % n == 0)
  return head_VD.reshape(shards, rows, D), blocks


def _pull_back(
  grad_BCV: jax.Array,
  hidden_BCD: jax.Array,
  head_svD: jax.Array,
  head_grad_svD: jax.Array,
  blocks: int,
) -> tuple[jax.Array, jax.Array]:
  """The gradient of a chunk's hidden states, and the head's with the chunk's share added.

  A block of the vocabulary at a time, within each device's part of it: no second array of
  the head's size is made, and a block is still in cache when its sum is updated. What the
  devices have of the hidden states' gradient is summed once, after the blocks.
  """
  B, C, D = hidden_BCD.shape
  shards, rows, _ = head_svD.shape
  grad_sXv = jnp.moveaxis(grad_BCV.reshape(B * C, shards, rows), 1, 0)
  hidden_XD = hidden_BCD.reshape(B * C, D)
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  block_rows = rows // blocks

  def add_block(i, carry):
    hidden_grad_sXD, head_grad_svD = carry
    block_of = functools.partial(
      jax.lax.dynamic_slice_in_dim, start_index=i * block_rows, slice_size=block_rows
    )
    block_sXv = block_of(grad_sXv, axis=2)
    hidden_grad_sXD += dot("sXv,svD->sXD", block_sXv, block_of(head_svD, axis=1))
    sum_svD = block_of(head_grad_svD, axis=1) + dot("sXv,XD->svD", block_sXv, hidden_XD)
    return hidden_grad_sXD, jax.lax.dynamic_update_slice_in_dim(
      head_grad_svD, sum_svD, i * block_rows, 1
    )

  zero_sXD = jnp.zeros((shards, B * C, D), jnp.float32)
  hidden_grad_sXD, head_grad_svD = jax.lax.fori_loop(
    0, blocks, add_block, (zero_sXD, head_grad_svD)
  )
  hidden_grad_BCD = jnp.sum(hidden_grad_sXD, 0).reshape(B, C, D)
  return hidden_grad_BCD.astype(head_svD.dtype), head_grad_svD


def _per_batch_shard(
  scan: Callable[..., PyTree],
  out_specs: PyTree,
  batch_axes: tuple[str, ...],
  hidden_BTD: jax.Array,
  head_VD: jax.Array,
  batch: Batch,
) -> PyTree:
  """Runs `scan(hidden, head, batch, sum_over_batch)` on each device's own sequences.

  Left to itself, the partitioner would sum every chunk's gradient of the head over the devices
  that hold other sequences; the vocabulary is its own to shard.
  """
  batch = batch.replace(inputs=None, valid_BS=None)  # the head has no use for them
  if _mesh_size(batch_axes, "batch_axes") == 1:
    return scan(hidden_BTD, head_VD, batch, lambda tree: tree)
  rows = P(batch_axes)
  specs = jax.tree.map(lambda _: rows, batch)
  for name, t in batch.targets.items():
    if t.head_VD is not None:  # every device has a teacher's head whole, as the student's
      specs.targets[name] = specs.targets[name].replace(head_VD=P())
  return jax.shard_map(
    functools.partial(scan, sum_over_batch=lambda tree: jax.lax.psum(tree, batch_axes)),
    in_specs=(rows, P(), specs),
    out_specs=out_specs,
    axis_names=set(batch_axes),
    check_vma=False,
  )(hidden_BTD, head_VD, batch)


class _Chunks(NamedTuple):
  """What the scan goes over: arrays with the n chunks as their first axis."""

  hidden_nBCD: jax.Array
  batch: Batch  # every array of it [n, B, C, ...]
  teacher_heads: dict[str, jax.Array | None]  # have no positions, so they are in every chunk

  def with_heads(self, piece: Batch) -> Batch:
    """One chunk of the batch with the heads of online teachers put back."""
    parts = {name: t.replace(head_VD=self.teacher_heads[name]) for name, t in piece.targets.items()}
    return piece.replace(targets=parts)


def _split(hidden_BTD: jax.Array, batch: Batch, chunk: int) -> _Chunks:
  """Cuts hidden states and batch into chunks of positions.

  Masked positions are zeroed here, once: a NaN there would survive `0 * NaN` in the
  gradient of the head. The last chunk is filled up with masked positions.
  """

  def cut(x_BT):
    mask = batch.mask_BT.reshape(batch.mask_BT.shape + (1,) * (x_BT.ndim - 2))
    return chunks.split(jnp.where(mask, x_BT, jnp.zeros((), x_BT.dtype)), chunk)

  # What has no position axis stays out of the scan and is put back into every chunk.
  heads = {name: t.head_VD for name, t in batch.targets.items()}
  targets = {n: t.replace(head_VD=None, taps_BPTD=None) for n, t in batch.targets.items()}
  batch_nBC = jax.tree.map(cut, batch.replace(inputs=None, targets=targets))
  return _Chunks(cut(hidden_BTD), batch_nBC, heads)


def _zeros_like_result(fn: Callable[[jax.Array, Batch], PyTree], pieces: _Chunks) -> PyTree:
  """Zeros of the shapes that `fn(hidden, batch)` has for a chunk."""
  first = jax.tree.map(lambda x: x[0], (pieces.hidden_nBCD, pieces.batch))
  shapes = jax.eval_shape(fn, *first)
  return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
