"""The fused head on CPUs: parts of a chunk that stay in cache.

XLA's programs for CPUs store most intermediate arrays, and cannot add a product to a sum in place.
So the losses are computed for a few positions at a time, and the products of the backward pass for
a few rows of the head. For TPUs and GPUs XLA fuses both, and the functions of `fused_head` are used
instead.

With an online teacher (the case `online` of tools/bench/head.py), the head takes 1.02 to 1.12 times
the CPU time and 1.3 times the temporaries if the losses are computed for a whole chunk, and 1.6 to
1.8 times the CPU time if the functions of `fused_head` are used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from distill_jax.types import Batch, PyTree

LOGITS_BYTES = 2**22  # maximum size of the logits for which losses are computed at once
BLOCK_BYTES = 2**23  # maximum size of the part of the head's gradient that one product computes

# (sums, logits_BCV, a chunk of the batch) -> (sums with those of the chunk, gradient of the logits)
AddLoss = Callable[[PyTree, jax.Array, Batch], tuple[PyTree, jax.Array]]


def by_rows(
  add_loss: AddLoss, sums: PyTree, logits_BCV: jax.Array, piece: Batch
) -> tuple[PyTree, jax.Array]:
  """Returns `add_loss(sums, logits_BCV, piece)`, computed for a few positions at a time.

  Args:
    add_loss: See AddLoss. It must not mix positions.
    sums: The sums of the chunks before.
    logits_BCV: The student's logits.
    piece: Labels, mask and targets of the chunk, with the logits of online teachers.
  """
  B, C, V = logits_BCV.shape
  rows = _divisor(B * C, LOGITS_BYTES // (V * logits_BCV.dtype.itemsize))
  if rows == B * C:
    return add_loss(sums, logits_BCV, piece)

  def add_rows(sums, xs):
    sums, grad_1CV = add_loss(sums, *jax.tree.map(lambda x_C: x_C[None], xs))
    return sums, grad_1CV[0]

  def cut(x_BC):
    return x_BC.reshape(-1, rows, *x_BC.shape[2:])

  sums, grad_nCV = jax.lax.scan(add_rows, sums, jax.tree.map(cut, (logits_BCV, piece)))
  return sums, grad_nCV.reshape(B, C, V)


def pull_back(
  grad_BCV: jax.Array, hidden_BCD: jax.Array, head_VD: jax.Array, head_grad_VD: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns `fused_head.pull_back` of the same arguments, computed for a few rows at a time.

  No second array of the head's size is allocated, and a block (`v` rows) is still in cache when its
  sum is updated.
  """
  (B, C, V), D = grad_BCV.shape, hidden_BCD.shape[-1]
  rows = V // _divisor(V, -(-head_grad_VD.nbytes // BLOCK_BYTES))
  grad_XV, hidden_XD = grad_BCV.reshape(B * C, V), hidden_BCD.reshape(B * C, D)
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  def add_block(i, sums):
    hidden_grad_XD, head_grad_VD = sums
    grad_Xv = jax.lax.dynamic_slice_in_dim(grad_XV, i * rows, rows, 1)
    head_vD, sum_vD = (
      jax.lax.dynamic_slice_in_dim(x_VD, i * rows, rows) for x_VD in (head_VD, head_grad_VD)
    )
    hidden_grad_XD += dot("Xv,vD->XD", grad_Xv, head_vD)
    sum_vD += dot("Xv,XD->vD", grad_Xv, hidden_XD)
    return hidden_grad_XD, jax.lax.dynamic_update_slice_in_dim(head_grad_VD, sum_vD, i * rows, 0)

  zero_XD = jnp.zeros((B * C, D), jnp.float32)
  hidden_grad_XD, head_grad_VD = jax.lax.fori_loop(0, V // rows, add_block, (zero_XD, head_grad_VD))
  return hidden_grad_XD.reshape(B, C, D).astype(head_VD.dtype), head_grad_VD


def _divisor(size: int, most: int) -> int:
  """Returns the largest divisor of `size` that is at most `most`, or 1."""
  return max(n for n in range(1, max(1, min(most, size)) + 1) if size % n == 0)
