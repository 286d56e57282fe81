"""Selection of tokens by their logits: systematic sampling, top k and argmax.

Systematic sampling (Madow 1949) uses N points and one uniform offset u per position. Point j is
(u + j)/N, and selects the token whose interval of the cumulative sum of p contains it, in the order
of token ids. The count of a token over N is an unbiased estimate of p with an error below 1/N.
Neither sorting nor top-k is needed.

The cumulative sum is not computed over the whole vocabulary, but over the sums of blocks of 256
tokens, then over 16 sums of 16 tokens in the block of each point, then over 16 tokens. A point then
reads V/256 + 32 numbers instead of V.

With a vocabulary that is sharded over mesh axes, one all-gather of a float per shard and position
gives each shard the mass before it. The shard that holds the token of a point finds it, and an
all-reduce of N integers per position distributes the result.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from distill_jax.nn.sharding import MeshAxes

FINE, BLOCK = 16, 256  # BLOCK = FINE * FINE
TOP_BLOCK = 64


def systematic(
  logits_BCV: jax.Array, u_BC: jax.Array, n: int, *, axis: MeshAxes = None
) -> jax.Array:
  """Returns the tokens of n equally spaced points of the cumulative sum of softmax(logits).

  Args:
    logits_BCV: float32 logits; -inf for tokens that are never selected.
    u_BC: float32 offsets in [0, 1).
    n: Number of points per position.
    axis: Mesh axes over which V is sharded, inside shard_map.

  Returns:
    int32 ids [B, C, n], nondecreasing along n. Ids without mass are never returned.
  """
  peak_BC = max_over_shards(jnp.max(logits_BCV, -1), axis)
  return points(jnp.exp(logits_BCV - peak_BC[..., None]), u_BC, n, axis)


def top_k(logits_BCV: jax.Array, k: int, *, axis: MeshAxes = None) -> tuple[jax.Array, jax.Array]:
  """Returns the k largest logits and their ids, float32 and int32 [B, C, k], largest first."""
  width = logits_BCV.shape[-1]
  top, ids = _local_top_k(logits_BCV, min(k, width))
  if axis is not None:
    ids = ids + jax.lax.axis_index(axis) * width
    top, ids = (jax.lax.all_gather(x, axis, axis=2, tiled=True) for x in (top, ids))
    top, at = jax.lax.top_k(top, k)
    ids = jnp.take_along_axis(ids, at, -1)
  return top, ids.astype(jnp.int32)


def _local_top_k(x_BCV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """Returns `lax.top_k`, ties included, from the k blocks with the largest maxima."""
  width = x_BCV.shape[-1]
  if width < 4 * k * TOP_BLOCK:
    return jax.lax.top_k(x_BCV, k)
  x_BCV = jnp.pad(x_BCV, ((0, 0), (0, 0), (0, -width % TOP_BLOCK)), constant_values=-jnp.inf)
  x_BCbt = x_BCV.reshape(*x_BCV.shape[:2], -1, TOP_BLOCK)
  _, blocks_BCK = jax.lax.top_k(jnp.max(x_BCbt, -1), k)
  blocks_BCK = jnp.sort(blocks_BCK, -1)  # the lowest id is selected among equal logits
  few_BCKt = _take_rows(x_BCbt, blocks_BCK)
  top, at = jax.lax.top_k(few_BCKt.reshape(*few_BCKt.shape[:2], -1), k)
  block = jnp.take_along_axis(blocks_BCK, at // TOP_BLOCK, -1)
  return top, block * TOP_BLOCK + at % TOP_BLOCK


def argmax(logits_BCV: jax.Array) -> jax.Array:
  """Returns the most probable tokens, the lowest id among equals, int32 [B, C]."""
  return peak_and_argmax(logits_BCV, None)[1]


def peak_and_argmax(logits_BCV: jax.Array, axis: MeshAxes) -> tuple[jax.Array, jax.Array]:
  """Returns the largest logit and the lowest id that has it, in one pass over V.

  On CPU jnp.argmax is ten times slower than a maximum. This computes the maxima of groups, the
  first group with the largest one, and the first place in it.
  """
  x_BCgf = groups(logits_BCV, -jnp.inf)
  top_BCg = jnp.max(x_BCgf, -1)
  peak_BC = max_over_shards(jnp.max(top_BCg, -1), axis)

  def first_peak(x: jax.Array) -> jax.Array:
    return jnp.argmax(x == peak_BC[..., None], -1).astype(jnp.int32)

  group_BC = first_peak(top_BCg)
  id_BC = group_BC * FINE + first_peak(_take_rows(x_BCgf, group_BC[..., None])[..., 0, :])
  if axis is not None:
    id_BC = id_BC + jax.lax.axis_index(axis) * logits_BCV.shape[-1]
    mine = jnp.max(top_BCg, -1) == peak_BC
    id_BC = jax.lax.pmin(jnp.where(mine, id_BC, jnp.iinfo(jnp.int32).max), axis)
  return peak_BC, id_BC


def groups(x_BCV: jax.Array, fill: float) -> jax.Array:
  """Returns x as groups [B, C, V / FINE, FINE], padded to whole blocks."""
  pad = ((0, 0), (0, 0), (0, -x_BCV.shape[-1] % BLOCK))
  x = jnp.pad(x_BCV, pad, constant_values=fill)
  return x.reshape(*x.shape[:2], -1, FINE)


def points(e_BCV: jax.Array, u_BC: jax.Array, n: int, axis: MeshAxes) -> jax.Array:
  """Returns the tokens of `systematic`, given unnormalised probabilities."""
  width = e_BCV.shape[-1]
  e_BCgf = groups(e_BCV, 0.0)  # g: groups of FINE tokens
  group_BCg = jnp.sum(e_BCgf, -1)
  group_BCbf = group_BCg.reshape(*group_BCg.shape[:2], -1, FINE)
  block_BCb = jnp.cumsum(jnp.sum(group_BCbf, -1), -1)

  shard: int | jax.Array = 0
  shards = 1
  before_BC, mass_BC = jnp.zeros_like(block_BCb[..., -1]), block_BCb[..., -1]
  if axis is not None:
    shard, shards = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    ends_BCs = jnp.cumsum(jax.lax.all_gather(mass_BC, axis, axis=2), -1)
    mass_BC = ends_BCs[..., -1]
    before_BC = jnp.where(shard > 0, ends_BCs[..., shard - 1], 0.0)
  j_11N = jnp.arange(n, dtype=jnp.float32)[None, None]
  x_BCN = (u_BC[..., None] + j_11N) / n * mass_BC[..., None]
  if shards > 1:
    owner_BCN, _ = _locate(ends_BCs[:, :, None, :], x_BCN)
  x_BCN = jnp.maximum(x_BCN - before_BC[..., None], 0.0)

  b_BCN, x_BCN = _locate(block_BCb[:, :, None, :], x_BCN)
  g_BCN, x_BCN = _locate(jnp.cumsum(_take_rows(group_BCbf, b_BCN), -1), x_BCN)
  g_BCN = b_BCN * FINE + g_BCN
  f_BCN, _ = _locate(jnp.cumsum(_take_rows(e_BCgf, g_BCN), -1), x_BCN)
  ids_BCN = (shard * width + g_BCN * FINE + f_BCN).astype(jnp.int32)
  if shards > 1:
    ids_BCN = jax.lax.psum(jnp.where(owner_BCN == shard, ids_BCN, 0), axis)
  return ids_BCN


def _locate(ends: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the index of the interval that holds x, and the offset of x in it.

  Intervals end at `ends` [..., intervals]. Intervals without mass at the end are not selected, even
  if rounding puts x past the last end.
  """
  passed = (ends <= x[..., None]) & (ends < ends[..., -1:])
  start = jnp.max(jnp.where(passed, ends, 0.0), -1)  # ends are nondecreasing
  return jnp.sum(passed, -1, dtype=jnp.int32), x - start


def _take_rows(table: jax.Array, rows_BCN: jax.Array) -> jax.Array:
  """Returns rows [B, C, N, numbers] of each position's table [B, C, rows, numbers]."""
  return jnp.take_along_axis(table, rows_BCN[..., None], 2)


def max_over_shards(x: jax.Array, axis: MeshAxes) -> jax.Array:
  """Returns the maximum over mesh axes inside shard_map; x itself if `axis` is None."""
  return x if axis is None else jax.lax.pmax(x, axis)


def sum_over_shards(x: jax.Array, axis: MeshAxes) -> jax.Array:
  """Returns the sum over mesh axes inside shard_map; x itself if `axis` is None."""
  return x if axis is None else jax.lax.psum(x, axis)
