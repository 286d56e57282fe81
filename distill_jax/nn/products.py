"""Products of activations with weights, and functions that the backward pass computes again."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


def product(x: jax.Array, w: jax.Array, contracted: int = 1) -> jax.Array:
  """Multiplies activations by a weight, like `jnp.tensordot(x, w, contracted)`.

  On one device, the positions of all rows are one axis of the product: XLA for CPUs transposes the
  activations in memory before it contracts two axes for the gradient of a weight, which makes the
  layers of a training step 1.3 times as slow. On several devices the axes stay apart, because they
  can be sharded.

  Args:
    x: [*positions, *k], the activations.
    w: [*k, *n], the weight.
    contracted: the number of axes k.

  Returns:
    [*positions, *n], in the dtype of the arguments.

  Example:
    q_BTHh = product(x_BTD, q_DHh)
    x_BTD = product(a_BTHh, o_HhD, 2)
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and mesh.size > 1:
    return jnp.tensordot(x, w, contracted)
  K = math.prod(w.shape[:contracted])
  y_XN = x.reshape(-1, K) @ w.reshape(K, -1)
  return y_XN.reshape(*x.shape[: x.ndim - contracted], *w.shape[contracted:])


def recomputed(fn: Callable[..., jax.Array], *args: jax.Array | None) -> jax.Array:
  """Applies a cheap function, e.g. an activation, that the backward pass computes again.

  The backward pass keeps the arguments. By itself, jax keeps intermediate results too: of
  `silu(gate) * up`, four arrays of that shape besides the arguments, in every layer.
  """
  # Layers are scanned, so XLA cannot merge the two computations, and needs no barrier against it.
  return jax.checkpoint(fn, prevent_cse=False)(*args)
