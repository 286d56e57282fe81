"""Attention on TPUs by jax's splash attention, which visits only the blocks that a mask needs.

jax builds the list of a mask's blocks on the host, so it cannot know the segments and computes the
whole triangle. Here the list is computed on the device from the segments. A query attends to the
keys from the beginning of its segment, or of its window, up to itself. So a block of queries visits
the consecutive blocks of keys from the earliest beginning to the latest index. All other steps of
the kernel's grid compute nothing and load nothing. Within a visited block the kernel masks scores
by segments and indices.

The rows of a batch are concatenated, which makes a batch one call of the kernel. The list takes
3 bytes of scalar memory (of 1 MiB) for each block of keys of each block of queries: 48 KiB for one
row of 131,072 positions, so 16 such rows fit on a device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as pallas
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

LANES = 128  # the kernel's blocks are multiples of this number of positions
BLOCKS = (512, 256, LANES)
# A step without a visit takes time, too (not measured: no TPU was at hand). With blocks of 512, a
# row of 32,768 has 4,096 steps for each head, with blocks of 1,024 a quarter; blocks of 2,048 do
# not fit into vector memory. With a window, there are few steps anyway.
LONG_ROW, LONG_BLOCK = 16_384, 1_024


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
  interpret: bool = False,
) -> jax.Array:
  """Computes attention of the queries of each row to all its keys.

  The kernel has no scale: queries are scaled in float32 and rounded once more.

  Args:
    q_BQHh: queries.
    k_BKGh: keys, in the order of the row.
    v_BKGh: values; they may be narrower than keys.
    q_segments_BQ: int32, the segment of each query.
    kv_segments_BK: int32, the segment of each key. The keys of a segment are consecutive.
    q_index_Q: int32, the index of each query's own key, to which it attends.
    at: index into `sizes`, which may be traced. Each size has its own kernel.
    sizes: window sizes; None for no window.
    scale: the factor of the scores.
    chunk: `q_index_Q` consists of runs of this many consecutive indices. With long chunks and a
      window, the grid has only as many steps as the window needs.
    interpret: whether Pallas interprets the kernel, on any device.

  Returns:
    [B, Q, H, width of values].
  """
  (_, Q, H, _), (B, K, _, _) = q_BQHh.shape, k_BKGh.shape
  # A query of the padding sees what the last query sees, so that its softmax is not empty. No query
  # sees the keys of the padding, which come after all indices.
  end = (0, -Q % LANES)
  q_index_Q = jnp.pad(q_index_Q, end, mode="edge")
  q_segments_BQ = jnp.pad(q_segments_BQ, ((0, 0), end), mode="edge")
  kv_segments_BK = jnp.pad(kv_segments_BK, ((0, 0), (0, -K % LANES)))
  segments = pallas.SegmentIds(q_segments_BQ.reshape(-1), kv_segments_BK.reshape(-1))

  def kernel_of(window: int | None) -> Callable[..., Any]:
    window = None if window is None or window >= K else window
    consecutive = len(q_index_Q) if chunk >= Q else chunk
    return _kernel(kv_segments_BK, q_index_Q, window, consecutive, interpret)

  branches = [kernel_of(window) for window in sizes]  # lax.switch calls a single branch directly
  q_BQHh = (q_BQHh.astype(jnp.float32) * scale).astype(q_BQHh.dtype)
  heads = (_concatenate_rows(x) for x in (q_BQHh, k_BKGh, v_BKGh))
  a_HRh = jax.lax.switch(at, branches, *heads, segments)
  return a_HRh.reshape(H, B, Q + end[1], -1)[:, :, :Q].transpose(1, 2, 0, 3)


def block_size(positions: int, window: int | None) -> int:
  """Returns the size of the blocks of a row, whose length is a multiple of LANES."""
  if window is None and positions >= LONG_ROW and positions % LONG_BLOCK == 0:
    return LONG_BLOCK
  return next(b for b in BLOCKS if positions % b == 0)


def visited_blocks(
  kv_segments_BK: jax.Array,
  q_index_Q: jax.Array,
  window: int | None,
  block_q: int,
  block_kv: int,
) -> tuple[jax.Array, jax.Array]:
  """Returns the first and the last block of keys that each block of queries visits, [B, blocks]."""
  index_K = jnp.arange(kv_segments_BK.shape[1], dtype=jnp.int32)
  begins_BK = jnp.pad(kv_segments_BK[:, 1:] != kv_segments_BK[:, :-1], ((0, 0), (1, 0)))
  begin_BK = jax.lax.cummax(jnp.where(begins_BK, index_K, 0), axis=1)
  begin_BQ = begin_BK[:, q_index_Q]
  if window is not None:
    begin_BQ = jnp.maximum(begin_BQ, q_index_Q[None] - window + 1)
  first_BI = begin_BQ.reshape(len(begin_BQ), -1, block_q).min(2) // block_kv
  last_I = q_index_Q.reshape(-1, block_q).max(1) // block_kv
  return first_BI, jnp.broadcast_to(last_I[None], first_BI.shape)


@dataclasses.dataclass(frozen=True)
class _Mask:
  """The part of the mask that the kernel computes from indices; equal masks share a compile."""

  window: int | None

  def __call__(self, q_index: jax.Array, k_index: jax.Array) -> jax.Array:
    seen = k_index <= q_index
    return seen if self.window is None else seen & (q_index - k_index < self.window)


def _concatenate_rows(x_BTHh: jax.Array) -> jax.Array:
  """Returns [H, B * T, h] with each row padded to full lanes."""
  padding = -x_BTHh.shape[1] % LANES
  x_HBTh = jnp.pad(x_BTHh.transpose(2, 0, 1, 3), ((0, 0), (0, 0), (0, padding), (0, 0)))
  return x_HBTh.reshape(x_HBTh.shape[0], -1, x_HBTh.shape[3])


def _kernel(
  kv_segments_BK: jax.Array, q_index_Q: jax.Array, window: int | None, chunk: int, interpret: bool
) -> Callable[..., Any]:
  """Returns the kernel for any number of heads: all have the same mask."""
  Q, K = len(q_index_Q), kv_segments_BK.shape[1]
  block_q, block_kv = block_size(Q, window), block_size(K, window)
  first_BI, last_BI = visited_blocks(kv_segments_BK, q_index_Q, window, block_q, block_kv)
  queries, keys = Q // block_q, K // block_kv
  if window is not None and chunk % block_q == 0:
    # A range of n positions touches at most 2 + (n - 2) // block blocks.
    queries = min(queries, 2 + (window + block_kv - 3) // block_q)
    keys = min(keys, 2 + (window + block_q - 3) // block_kv)
  B = len(kv_segments_BK)
  index = jnp.int16 if B * max(Q // block_q, K // block_kv) < 2**15 else jnp.int32
  row_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]
  q_sequence: Any = (row_B1 * K + q_index_Q[None]).reshape(-1)
  of_queries, of_keys = (
    MaskInfo(next_.astype(index), None, visited.astype(jnp.int8), None, q_sequence)
    for next_, visited in (
      key_blocks(first_BI, last_BI, keys, K // block_kv),
      query_blocks(first_BI, last_BI, queries, K // block_kv),
    )
  )
  return pallas.SplashAttentionKernel(
    of_queries,
    of_queries,
    of_keys,
    mask_function=_Mask(window),
    mask_value=pallas.DEFAULT_MASK_VALUE,
    is_mqa=False,
    save_residuals=False,
    attn_logits_soft_cap=None,
    residual_checkpoint_name=None,
    interpret=interpret,
    block_sizes=pallas.BlockSizes(
      block_q=block_q,
      block_kv=block_kv,
      block_q_dkv=block_q,
      block_kv_dkv=block_kv,
      block_q_dq=block_q,
      block_kv_dq=block_kv,
    ),
  )


def key_blocks(
  first_BI: jax.Array, last_BI: jax.Array, steps: int, blocks: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the block of keys at each step of a block of queries, and whether it is visited.

  A step without a visit names the next block to visit, which the kernel loads ahead.

  Returns:
    Two arrays [1, blocks of queries in all rows, steps].
  """
  row_B11 = jnp.arange(len(first_BI), dtype=jnp.int32)[:, None, None]
  block_BIS = first_BI[..., None] + jnp.arange(steps, dtype=jnp.int32)[None, None]
  visited_BIS = block_BIS <= last_BI[..., None]
  block_BIS += row_B11 * blocks
  following_BI1 = jnp.roll(block_BIS[..., 0], -1).reshape(*first_BI.shape, 1)
  next_BIS = jnp.where(visited_BIS, block_BIS, following_BI1)
  return next_BIS.reshape(1, -1, steps), visited_BIS.reshape(1, -1, steps)


def query_blocks(
  first_BI: jax.Array, last_BI: jax.Array, steps: int, blocks: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the block of queries at each step of a block of keys, and whether it is visited.

  Returns:
    Two arrays [1, steps, blocks of keys in all rows].
  """
  B, I = first_BI.shape
  i_1I1 = jnp.arange(I, dtype=jnp.int32)[None, :, None]
  j_11J = jnp.arange(blocks, dtype=jnp.int32)[None, None]
  visited_BIJ = (first_BI[..., None] <= j_11J) & (j_11J <= last_BI[..., None])
  order_BSJ = jnp.sort(jnp.where(visited_BIJ, i_1I1, I), axis=1)[:, :steps]  # visits come first
  visited_BSJ = order_BSJ < I
  # The next head begins again with the first visit. A block that no query sees has none.
  next_BSJ = jnp.where(visited_BSJ, order_BSJ, jnp.minimum(order_BSJ[:, :1], I - 1))
  next_BSJ += jnp.arange(B, dtype=jnp.int32)[:, None, None] * I
  next_S, visited_S = (x.transpose(1, 0, 2).reshape(1, steps, -1) for x in (next_BSJ, visited_BSJ))
  return next_S, visited_S
