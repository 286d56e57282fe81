"""Attention on GPUs by cuDNN, which computes the segments of a row as separate sequences.

cuDNN's packed layout takes the beginning and the length of each segment, so blocks between segments
are never visited and no mask [B, T, T] exists: 34 GB for a row of 131,072 positions. It needs a GPU
of the Hopper generation or later and rows in natural order. Elsewhere, and for layers with a
window, cuDNN adds a mask to the scores (dense.attention).

The layout is not in jax's public API, and no GPU was at hand when this was written: the tests
compare the calls of jax's function with an emulation, and lower both passes for CUDA. It is
therefore a separate kernel, "cudnn_packed", which "auto" does not select.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo

from distill_jax.nn import dense

# Segments of a row in one call. jax stores a float32 for each of them, each position and each head,
# in all as much as bfloat16 queries of width 64. Rows with more segments take several calls.
SEGMENTS = 32
Arrays = tuple[jax.Array, ...]


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
) -> jax.Array:
  """Computes attention of the queries of each row to all its keys.

  Arguments and result are those of `splash.attention`.
  """
  (B, Q, H, h), K = q_BQHh.shape, k_BKGh.shape[1]
  packs = chunk >= K == Q and capability() >= 9 and B * Q * H * h < 2**31  # offsets are int32

  def of_window(window: int | None) -> Callable[..., jax.Array]:
    if packs and (window is None or window >= K):
      return lambda q, k, v: packed(q, k, v, kv_segments_BK, scale)
    return lambda q, k, v: dense.attention(
      *(q, k, v, q_segments_BQ, kv_segments_BK, q_index_Q, jnp.int32(0)),
      sizes=(window,),
      scale=scale,
      chunk=chunk,
      implementation="cudnn",
    )

  return jax.lax.switch(at, [of_window(window) for window in sizes], q_BQHh, k_BKGh, v_BKGh)


def capability() -> int:
  """Returns the major number of the GPU's compute capability; 9 (Hopper) without a GPU."""
  return int(getattr(jax.devices()[0], "compute_capability", "9.0").split(".")[0])


def packed(
  q_BTHh: jax.Array, k_BTGh: jax.Array, v_BTGh: jax.Array, segments_BT: jax.Array, scale: float
) -> jax.Array:
  """Computes causal attention within segments, each as a separate sequence."""
  # jax 0.10.2 computes the offsets of keys and values from the heads and the width of queries.
  repeats, width = q_BTHh.shape[2] // k_BTGh.shape[2], v_BTGh.shape[3]
  k_BTHh, v_BTHh = (
    jnp.repeat(x, repeats, axis=2) for x in (k_BTGh, dense.as_wide_as(v_BTGh, q_BTHh))
  )
  begins_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)))
  number_BT = jnp.cumsum(begins_BT, axis=1, dtype=jnp.int32)
  return _all_segments(q_BTHh, k_BTHh, v_BTHh, number_BT, scale)[..., :width]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _all_segments(
  q_BTHh: jax.Array, k_BTHh: jax.Array, v_BTHh: jax.Array, number_BT: jax.Array, scale: float
) -> jax.Array:
  """Computes attention within segments, which are numbered from 0 in each row."""
  return _forward(q_BTHh, k_BTHh, v_BTHh, number_BT, scale)[0]


def _forward(
  q_BTHh: jax.Array, k_BTHh: jax.Array, v_BTHh: jax.Array, number_BT: jax.Array, scale: float
) -> tuple[jax.Array, Any]:
  q_k_v = q_BTHh, k_BTHh, v_BTHh
  a_BTHh, pull = jax.vjp(functools.partial(_call, number_BT, 0, scale), *q_k_v)

  def add(i: jax.Array, a_BTHh: jax.Array) -> jax.Array:
    return _of_call(number_BT, i, _call(number_BT, i, scale, *q_k_v), a_BTHh)

  a_BTHh = jax.lax.fori_loop(1, _calls(number_BT), add, a_BTHh)
  return a_BTHh, (pull, q_k_v, number_BT)


def _backward(scale: float, residuals: Any, out_grad: jax.Array) -> tuple[jax.Array | None, ...]:
  """Returns the gradients. Calls after the first one compute their forward pass again."""
  pull, q_k_v, number_BT = residuals

  def add(i: jax.Array, grads: Arrays) -> Arrays:
    _, pull = jax.vjp(functools.partial(_call, number_BT, i, scale), *q_k_v)
    new = pull(out_grad)
    return tuple(_of_call(number_BT, i, *pair) for pair in zip(new, grads, strict=True))

  return *jax.lax.fori_loop(1, _calls(number_BT), add, tuple(pull(out_grad))), None


_all_segments.defvjp(_forward, _backward)


def _calls(number_BT: jax.Array) -> jax.Array:
  """Returns the number of calls that compute all segments."""
  return number_BT.max() // SEGMENTS + 1


def _of_call(number_BT: jax.Array, i: int | jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
  """Returns `new` at the positions whose segments call i computes, and `old` elsewhere.

  cuDNN writes nothing to the other positions of its results.
  """
  return jnp.where((number_BT // SEGMENTS == i)[..., None, None], new, old)


def _call(
  number_BT: jax.Array,
  i: int | jax.Array,
  scale: float,
  q_BTHh: jax.Array,
  k_BTHh: jax.Array,
  v_BTHh: jax.Array,
) -> jax.Array:
  """Computes the segments of call i: those with the numbers i * SEGMENTS, … in each row."""
  numbers_N = i * SEGMENTS + jnp.arange(SEGMENTS + 1, dtype=jnp.int32)
  edges_BN = jax.vmap(lambda row_T: jnp.searchsorted(row_T, numbers_N))(number_BT)
  edges_BN = edges_BN.astype(jnp.int32)
  sizes_BM = jnp.diff(edges_BN, axis=1)
  absent_BM = sizes_BM == 0  # jax wants -1 there, and one offset more than sizes
  offsets_BN = jnp.pad(
    jnp.where(absent_BM, -1, edges_BN[:, :-1]), ((0, 0), (0, 1)), constant_values=-1
  )
  sizes_BM = jnp.where(absent_BM, -1, sizes_BM)
  return fused_attention_stablehlo.dot_product_attention(
    q_BTHh,
    k_BTHh,
    v_BTHh,
    q_seqlen=sizes_BM,
    kv_seqlen=sizes_BM,
    q_offsets=offsets_BN,
    kv_offsets=offsets_BN,
    scale=scale,
    mask_type=fused_attention_stablehlo.MaskType.PADDING_CAUSAL,
  )
