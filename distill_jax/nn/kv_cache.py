"""The KV cache of a layer, in the compute dtype or as int8.

An int8 cache stores the vector x of a position and head as round(x / s). The scale s is a float32
number, the largest |x| of the vector divided by 127, so no number changes by more than s / 2. The
scale depends on that vector alone, so a row's cache does not depend on the other rows.

The slots of a row are divided into blocks, which are separate arrays, so that attention reads only
the blocks in use. (XLA for CPUs copies a slice of an array before it multiplies with it.)
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from distill_jax.nn import attention, sharding
from distill_jax.nn.sharding import Rules

DTYPES = ("", "int8")
FEATURES = ("head_dim", "latent")  # the axis along which numbers share a scale
MAX_INT8 = 127
SCALE = "_scale"  # suffix of the name of an array's scales

BLOCK, BLOCKS = 128, 8  # blocks have a multiple of BLOCK slots, and a row has at most BLOCKS

# Arrays by the names in Block.CACHE, and their scales, in blocks of slots.
LayerCache = dict[str, tuple[jax.Array, ...]]
CacheBlock = tuple[dict[str, jax.Array], ...]  # one block of each layer
CacheAxes = dict[str, str]  # Block.CACHE: axes by array, e.g. "batch kv_heads seq head_dim"


def axes_of_scale(axes: str) -> str:
  """Returns the axes of the scales of an array with `axes`: all except the features."""
  return " ".join(a for a in axes.split() if a not in FEATURES)


def block_sizes(slots: int, platform: str) -> tuple[int, ...]:
  """Returns the sizes of the blocks in which the slots of a row are stored.

  Blocks except the last have the same size. On GPUs there is one block, because XLA copies the
  condition of each conditional to the host.
  """
  size = slots if platform in attention.GPU else BLOCK * -(-slots // (BLOCK * BLOCKS))
  return tuple(min(size, slots - first) for first in range(0, slots, size))


def write(
  cache: LayerCache, new: dict[str, jax.Array], slots_BT: jax.Array, axes: CacheAxes, rules: Rules
) -> LayerCache:
  """Returns the cache with T new positions written to their slots.

  Args:
    cache: the arrays of a layer.
    new: the new positions by array, each [B, T, ...].
    slots_BT: int32, the slot of each new position. Slots out of range are dropped.
    axes: the logical axes of each array.
    rules: the sharding of the arrays.
  """
  written: LayerCache = {}

  def write_array(name: str, x_BT: jax.Array, axes_of_array: str) -> None:
    slot_axis = axes_of_array.split().index("seq")
    blocks, first = [], 0
    for old in cache[name]:
      size = old.shape[slot_axis]
      here_BT = (slots_BT >= first) & (slots_BT < first + size)
      at_BT = jnp.where(here_BT, slots_BT - first, size)
      x = attention.write_slots(old, x_BT, at_BT, slot_axis)
      blocks.append(sharding.constrain(x, axes_of_array, rules))
      first += size
    written[name] = tuple(blocks)

  for name, x_BT in new.items():
    if name + SCALE in cache:
      x_BT, scale_BT = to_int8(x_BT)
      write_array(name + SCALE, scale_BT, axes_of_scale(axes[name]))
    write_array(name, x_BT, axes[name])
  return written


def sizes(cache: LayerCache, axes: CacheAxes) -> tuple[int, ...]:
  """Returns the number of slots of each block of a cache."""
  name, axes_of_array = next(iter(axes.items()))
  return tuple(block.shape[axes_of_array.split().index("seq")] for block in cache[name])


def block(cache: Sequence[LayerCache], n: int) -> CacheBlock:
  """Returns block n of each layer."""
  return tuple({name: blocks[n] for name, blocks in layer.items()} for layer in cache)


def with_block(cache: Sequence[LayerCache], n: int, new: CacheBlock) -> tuple[LayerCache, ...]:
  """Returns the cache with another block n."""
  return tuple(
    {name: (*blocks[:n], of_layer[name], *blocks[n + 1 :]) for name, blocks in layer.items()}
    for layer, of_layer in zip(cache, new, strict=True)
  )


def read(cache: LayerCache, axes: CacheAxes, dtype: jnp.dtype, n: int) -> dict[str, jax.Array]:
  """Returns the arrays of block n of a cache in the compute dtype, by their names in `axes`."""
  return {name: _read_array(cache, name, axes_of, dtype, n) for name, axes_of in axes.items()}


def _read_array(cache: LayerCache, name: str, axes: str, dtype: jnp.dtype, n: int) -> jax.Array:
  if name + SCALE not in cache:
    return cache[name][n]
  feature_axis = next(i for i, axis in enumerate(axes.split()) if axis in FEATURES)
  scale = jnp.expand_dims(cache[name + SCALE][n], feature_axis)
  return (cache[name][n].astype(jnp.float32) * scale).astype(dtype)


def to_int8(x_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns int8 [B, T, ..., n] and its float32 scales [B, T, ...], one for each last axis."""
  x_BT = x_BT.astype(jnp.float32)
  scale_BT = jnp.max(jnp.abs(x_BT), -1) / MAX_INT8
  steps_BT = jnp.round(x_BT / jnp.where(scale_BT > 0, scale_BT, 1.0)[..., None])
  return steps_BT.astype(jnp.int8), scale_BT


def shapes(x_BT: jax.ShapeDtypeStruct, name: str, axes: str, dtype: str) -> dict:
  """Returns the arrays that store `name` in a cache, as (shape, dtype, axes) by array name.

  Args:
    x_BT: the shape and dtype of one position, [1, 1, ...].
    name: the array's name in Block.CACHE.
    axes: its logical axes.
    dtype: one of DTYPES.
  """
  if dtype != "int8":
    return {name: (x_BT.shape, x_BT.dtype, axes)}
  scale = x_BT.shape[:-1], jnp.float32, axes_of_scale(axes)
  return {name: (x_BT.shape, jnp.int8, axes), name + SCALE: scale}
