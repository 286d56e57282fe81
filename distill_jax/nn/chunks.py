"""Splits arrays over positions into chunks to scan over, and joins them again."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def split(x_BT: jax.Array, chunk: int) -> jax.Array:
  """Splits [B, T, ...] into [n, B, C, ...]: n chunks of C = min(chunk, T) positions.

  Args:
    x_BT: an array whose axes 0 and 1 are sequences and positions.
    chunk: the number of positions of a chunk. It need not divide T: the last chunk is padded with
      zeros.
  """
  T = x_BT.shape[1]
  chunk = min(chunk, T)
  x_BT = jnp.pad(x_BT, ((0, 0), (0, -T % chunk)) + ((0, 0),) * (x_BT.ndim - 2))
  return jnp.moveaxis(x_BT.reshape(x_BT.shape[0], -1, chunk, *x_BT.shape[2:]), 1, 0)


def join(x_nBC: jax.Array, T: int) -> jax.Array:
  """Joins the chunks that `split` returned into [B, T, ...], without the padding."""
  x_BnC = jnp.moveaxis(x_nBC, 0, 1)
  return x_BnC.reshape(x_BnC.shape[0], -1, *x_BnC.shape[3:])[:, :T]
