"""Attention with a mask of all pairs of positions, by XLA or by cuDNN."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from distill_jax.nn.products import recomputed


def attention(
  q_BQHh: jax.Array,
  k_BKGh: jax.Array,
  v_BKGh: jax.Array,
  q_segments_BQ: jax.Array,
  kv_segments_BK: jax.Array,
  q_index_Q: jax.Array,
  at: jax.Array,
  sizes: tuple[int | None, ...],
  scale: float,
  chunk: int = 1,
  implementation: Literal["xla", "cudnn"] = "xla",
) -> jax.Array:
  """Computes attention of the queries of each row to all its keys, with a mask [B, Q, K].

  XLA computes the scores of a layer [B, H, Q, K] as one array, and computes them again in the
  backward pass. cuDNN does not store them: it adds the mask to them.

  Arguments and result are those of `splash.attention`, except `implementation`, the library that
  computes. cuDNN skips the blocks above the diagonal if `chunk` is the whole row.
  """
  K, width = v_BKGh.shape[1], v_BKGh.shape[-1]
  back_QK = q_index_Q[:, None] - jnp.arange(K, dtype=jnp.int32)[None]
  seen_QK = back_QK >= 0
  if sizes != (None,):
    seen_QK &= back_QK < jnp.asarray([w or K for w in sizes])[at]
  mask_BQK = seen_QK[None] & (q_segments_BQ[:, :, None] == kv_segments_BK[:, None, :])
  attend = functools.partial(
    jax.nn.dot_product_attention,
    scale=scale,
    is_causal=chunk >= K == q_BQHh.shape[1],
    implementation=implementation,
  )
  # jax needs values as wide as keys. There is no bias.
  args = q_BQHh, k_BKGh, as_wide_as(v_BKGh, q_BQHh), None, mask_BQK[:, None]
  a_BQHh = attend(*args) if implementation == "cudnn" else recomputed(attend, *args)
  return a_BQHh[..., :width]


def as_wide_as(v_BKGh: jax.Array, q_BQHh: jax.Array) -> jax.Array:
  """Returns the values with zeros after them, as wide as the queries."""
  missing = q_BQHh.shape[-1] - v_BKGh.shape[-1]
  return jnp.pad(v_BKGh, ((0, 0), (0, 0), (0, 0), (0, missing)))
