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
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from distill_jax.nn import sharding
from distill_jax.types import Batch

# (logits_BCV float32, the chunk of the batch) -> anything that merges by addition.
ChunkFn = Callable[[jax.Array, Batch], Any]

BLOCK = 2**23  # bytes of the head's gradient that one product makes


def logits(hidden_BTD: jax.Array, head_VD: jax.Array, vocab_size: int | None = None) -> jax.Array:
  """float32 [B, T, V], whatever the dtype of the product's inputs.

  Rows of the head from `vocab_size` on are padding: -inf, so that they get no probability.
  """
  z_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, head_VD, preferred_element_type=jnp.float32)
  if vocab_size is None or vocab_size >= head_VD.shape[0]:
    return z_BTV
  real_V = jnp.arange(head_VD.shape[0]) < vocab_size
  return jnp.where(real_V[None, None], z_BTV, -jnp.inf)


def soft_cap(logits_BTV: jax.Array, cap: float | None) -> jax.Array:
  """cap * tanh(logits / cap), where a family has a cap (arXiv:2408.00118); padding stays -inf."""
  if cap is None:
    return logits_BTV
  return jnp.where(logits_BTV > -jnp.inf, cap * jnp.tanh(logits_BTV / cap), -jnp.inf)


def only_rows(logits_BCV: jax.Array, rows_BC2: jax.Array | None) -> jax.Array:
  """Logits of those rows among which each position chooses, from `first` to before `past`.

  The others are -inf, as padding rows are. None, and a position whose rows are (0, 0), as
  masked ones' are, choose among all.
  """
  if rows_BC2 is None:
    return logits_BCV
  row_V = jnp.arange(logits_BCV.shape[-1])[None, None]
  first, past = rows_BC2[..., :1], rows_BC2[..., 1:]
  return jnp.where(((row_V >= first) & (row_V < past)) | (past == 0), logits_BCV, -jnp.inf)


def fit_rows(logits_BCV: jax.Array, like_BCV: jax.Array) -> jax.Array:
  """Logits over as many rows as `like` has: padding rows are cut, or added as -inf.

  Rows that are padding on either side are padding here: both sides sum over the same tokens.
  """
  rows = like_BCV.shape[-1]
  logits_BCV = logits_BCV[..., :rows]
  if missing := rows - logits_BCV.shape[-1]:
    pad = ((0, 0), (0, 0), (0, missing))
    logits_BCV = jnp.pad(logits_BCV, pad, constant_values=-jnp.inf)
  return jnp.where(like_BCV > -jnp.inf, logits_BCV, -jnp.inf)


def fold(
  fn: ChunkFn,
  hidden_BTD: jax.Array,
  head_VD: jax.Array,
  batch: Batch,
  chunk: int,
  vocab_size: int | None = None,
) -> Any:
  """Sums `fn(logits_BCV, chunk of the batch)` over chunks, with no gradient: for metrics."""

  def scan(hidden_BTD, head_VD, batch, total):
    hidden_nBCD, pieces, whole = _split(hidden_BTD, batch, chunk)

    def one(hidden_BCD, piece):
      with jax.named_scope("head"):
        return fn(logits(hidden_BCD, head_VD, vocab_size), whole(piece))

    zero = _zeros_like_first(one, hidden_nBCD, pieces)
    add = lambda total, xs: (jax.tree.map(jnp.add, total, one(*xs)), None)
    return total(jax.lax.scan(add, zero, (hidden_nBCD, pieces))[0])

  return _per_batch_shard(scan, P(), hidden_BTD, head_VD, batch)


def loss(
  fn: Callable[[jax.Array, Batch], tuple[jax.Array, Any]],
  hidden_BTD: jax.Array,
  head_VD: jax.Array,
  batch: Batch,
  chunk: int,
  vocab_size: int | None = None,
) -> tuple[jax.Array, Any]:
  """Sums a loss over chunks; its gradient is ready when the forward pass ends.

  Args:
    fn: (logits_BCV float32, chunk of the batch) -> (loss, metrics): a scalar already
      weighted and divided by the global token count, and a tree that merges by addition.
    hidden_BTD: after the final norm, float32 or bfloat16.
    head_VD: the unembedding, in the same dtype.
    batch: labels, mask and targets; masked positions may hold anything, NaN included.
    chunk: positions of each sequence at once; it need not divide T.
    vocab_size: rows of the head from here on are padding.

  Returns:
    (total loss, metrics), float32. The total is differentiable in hidden_BTD and head_VD,
    the metrics are not. The gradient of the head is summed in float32.
  """

  def scan(hidden_BTD, head_VD, batch, total):
    hidden_nBCD, pieces, whole = _split(hidden_BTD, batch, chunk)

    def one(hidden_BCD, piece):
      """(loss, metrics) of a chunk, and the gradient of its logits."""
      with jax.named_scope("head"):
        z_BCV = logits(hidden_BCD, head_VD, vocab_size)
        value, pull, metrics = jax.vjp(lambda z: fn(z, whole(piece)), z_BCV, has_aux=True)
        grad_BCV = pull(jnp.ones_like(value))[0].astype(head_VD.dtype)
      return (value, metrics), grad_BCV

    head_SRD, blocks = _blocks(head_VD)

    def body(carry, xs):
      sums, total_SRD = carry
      new, grad_BCV = one(*xs)
      with jax.named_scope("head"):
        grad_BCD, total_SRD = _pull_back(grad_BCV, xs[0], head_SRD, total_SRD, blocks)
      return (jax.tree.map(jnp.add, sums, new), total_SRD), grad_BCD

    zero = _zeros_like_first(lambda *xs: one(*xs)[0], hidden_nBCD, pieces)
    zero = (zero, jnp.zeros(head_SRD.shape, jnp.float32))
    (sums, total_SRD), grad_nBCD = jax.lax.scan(body, zero, (hidden_nBCD, pieces))
    sums = sums, total_SRD.reshape(head_VD.shape)
    # Summed over the devices that share the head once a pass, not once a chunk.
    sums, head_grad_VD = total(sums)
    return sums, head_grad_VD, _join(grad_nBCD, hidden_BTD.shape[1])

  @jax.custom_vjp
  def total(hidden_BTD, head_VD):
    return fold(fn, hidden_BTD, head_VD, batch, chunk, vocab_size)

  def forward(hidden_BTD, head_VD):
    out_specs = (P(), P(), P(sharding.BATCH))
    sums, head_grad_VD, grad_BTD = _per_batch_shard(scan, out_specs, hidden_BTD, head_VD, batch)
    return sums, (grad_BTD, head_grad_VD.astype(head_VD.dtype))

  def backward(grads, cotangent):
    return jax.tree.map(lambda g: (g * cotangent[0]).astype(g.dtype), grads)

  total.defvjp(forward, backward)
  return total(hidden_BTD, head_VD)


def _blocks(head_VD: jax.Array) -> tuple[jax.Array, int]:
  """The head as [S, R, D], a row of S for each device that may hold a part, and blocks of R."""
  V, D = head_VD.shape
  mesh = jax.sharding.get_abstract_mesh()
  S = math.prod(n for axis, n in mesh.shape.items() if axis not in sharding.BATCH)
  S = 1 if V % S else S
  want = -(-V // S * D * 4 // BLOCK)
  blocks = max(n for n in range(1, want + 1) if V // S % n == 0)
  return head_VD.reshape(S, V // S, D), blocks


def _pull_back(
  grad_BCV: jax.Array, hidden_BCD: jax.Array, head_SRD: jax.Array, total_SRD: jax.Array, blocks: int
) -> tuple[jax.Array, jax.Array]:
  """The gradient of a chunk's hidden states, and the head's with the chunk's share added.

  A block of the vocabulary at a time, within each device's part of it: no second array of
  the head's size is made, and a block is still in cache when its sum is updated. What the
  devices have of the hidden states' gradient is summed once, after the blocks.
  """
  B, C, D = hidden_BCD.shape
  S, R, _ = head_SRD.shape
  grad_SNR = jnp.moveaxis(grad_BCV.reshape(B * C, S, R), 1, 0)
  hidden_ND = hidden_BCD.reshape(B * C, D)
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  rows = R // blocks

  def block(i, carry):
    grad_SND, total_SRD = carry
    at = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, i * rows, rows, axis)
    part_SNR = at(grad_SNR, 2)
    grad_SND += dot("SNR,SRD->SND", part_SNR, at(head_SRD, 1))
    new_SRD = at(total_SRD, 1) + dot("SNR,ND->SRD", part_SNR, hidden_ND)
    return grad_SND, jax.lax.dynamic_update_slice_in_dim(total_SRD, new_SRD, i * rows, 1)

  zero = jnp.zeros((S, B * C, D), jnp.float32)
  grad_SND, total_SRD = jax.lax.fori_loop(0, blocks, block, (zero, total_SRD))
  return jnp.sum(grad_SND, 0).reshape(B, C, D).astype(head_SRD.dtype), total_SRD


def _per_batch_shard(fn: Callable, out_specs: Any, hidden_BTD, head_VD, batch: Batch) -> Any:
  """Runs `fn(hidden, head, batch, total)` on each device's own rows of the batch.

  `total` sums a tree over the devices that hold other rows. Left to itself, the partitioner
  would sum every chunk's gradient of the head over them; the vocabulary is its own to shard.
  """
  batch = batch.replace(inputs=None, valid_BS=None)  # the head has no use for them
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or math.prod(mesh.shape[a] for a in sharding.BATCH) == 1:
    return fn(hidden_BTD, head_VD, batch, lambda tree: tree)
  rows = P(sharding.BATCH)
  specs = jax.tree.map(lambda _: rows, batch)
  for name, t in batch.targets.items():
    if t.head_VD is not None:  # every device has a teacher's head whole, as the student's
      specs.targets[name] = specs.targets[name].replace(head_VD=P())
  total = lambda tree: jax.lax.psum(tree, sharding.BATCH)
  return jax.shard_map(
    functools.partial(fn, total=total),
    in_specs=(rows, P(), specs),
    out_specs=out_specs,
    axis_names=set(sharding.BATCH),
    check_vma=False,
  )(hidden_BTD, head_VD, batch)


def _split(hidden_BTD: jax.Array, batch: Batch, chunk: int):
  """Chunks along positions as a leading axis, and what makes a whole Batch of a chunk.

  Masked positions are zeroed here, once: a NaN there would survive `0 * NaN` in the
  gradient of the head. The last chunk is filled up with masked positions.
  """
  T = hidden_BTD.shape[1]
  chunk = min(chunk, T)
  n = -(-T // chunk)

  def cut(x_BT):
    mask = batch.mask_BT.reshape(batch.mask_BT.shape + (1,) * (x_BT.ndim - 2))
    x_BT = jnp.where(mask, x_BT, jnp.zeros((), x_BT.dtype))
    x_BT = jnp.pad(x_BT, ((0, 0), (0, n * chunk - T)) + ((0, 0),) * (x_BT.ndim - 2))
    return jnp.moveaxis(x_BT.reshape(x_BT.shape[0], n, chunk, *x_BT.shape[2:]), 1, 0)

  # What has no position axis stays out of the scan and is put back into every chunk.
  heads = {name: t.head_VD for name, t in batch.targets.items()}
  targets = {n: t.replace(head_VD=None, taps_BPTD=None) for n, t in batch.targets.items()}
  pieces = jax.tree.map(cut, batch.replace(inputs=None, targets=targets))

  def whole(piece: Batch) -> Batch:
    parts = {name: t.replace(head_VD=heads[name]) for name, t in piece.targets.items()}
    return piece.replace(targets=parts)

  return cut(hidden_BTD), pieces, whole


def _join(x_nBCD: jax.Array, T: int) -> jax.Array:
  n, B, C, D = x_nBCD.shape
  return jnp.moveaxis(x_nBCD, 0, 1).reshape(B, n * C, D)[:, :T]


def _zeros_like_first(fn: Callable, *stacked: Any) -> Any:
  shapes = jax.eval_shape(fn, *jax.tree.map(lambda x: x[0], stacked))
  return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def log_sum_exp(logits_BCV: jax.Array) -> jax.Array:
  """log of the sum of exponentials, [B, C, 1]: one form for every loss and metric.

  What several of them ask of the same logits is then the same to XLA, and done once a chunk.
  """
  return jax.nn.logsumexp(logits_BCV, axis=-1, keepdims=True)


def logp_at(logits_BCV: jax.Array, ids_BCK: jax.Array) -> jax.Array:
  """log softmax at a few ids, [B, C, K], without the log-probabilities of all the others."""
  picked = jnp.take_along_axis(logits_BCV, ids_BCK, axis=-1)
  return picked - log_sum_exp(logits_BCV)
