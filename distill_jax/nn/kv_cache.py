"""The arrays that a layer keeps of positions while it decodes, as they are or as int8.

An int8 cache holds x of a position and head as round(x / s), where s, a float32 beside it, is the
largest |x| there over 127. No number is off by more than s / 2. The same numbers always give the
same integers, so what is kept of a row depends on that row alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from distill_jax.nn import attention, sharding

DTYPES = ("", "int8")
FEATURES = ("head_dim", "latent")  # the axis that has a scale in common
MAX_INT8 = 127
SCALE = "_scale"  # what follows an array's name in that of its scales

LayerCache = dict[str, jax.Array]  # by the names in Block.CACHE, and those of scales
CacheAxes = dict[str, str]  # Block.CACHE: the axes of each array, as "batch kv_heads seq head_dim"


def axes_of_scale(axes: str) -> str:
  """As `axes`, the features gone."""
  return " ".join(a for a in axes.split() if a not in FEATURES)


def write(
  cache: LayerCache, new: LayerCache, slots_BT: jax.Array, axes: CacheAxes, rules: sharding.Rules
) -> LayerCache:
  """Returns the cache with T new positions [B, T, ...] in their slots."""
  written: LayerCache = {}

  def write_array(name: str, x_BT: jax.Array, axes_of_array: str) -> None:
    slot_axis = axes_of_array.split().index("seq")
    x = attention.write_slots(cache[name], x_BT, slots_BT, slot_axis)
    written[name] = sharding.constrain(x, axes_of_array, rules)

  for name, x_BT in new.items():
    if name + SCALE in cache:
      x_BT, scale_BT = to_int8(x_BT)
      write_array(name + SCALE, scale_BT, axes_of_scale(axes[name]))
    write_array(name, x_BT, axes[name])
  return written


def read(cache: LayerCache, axes: CacheAxes, dtype: jnp.dtype) -> LayerCache:
  """Returns the cache in the compute dtype, by the names in CACHE."""
  return {name: _read_array(cache, name, axes_of, dtype) for name, axes_of in axes.items()}


def _read_array(cache: LayerCache, name: str, axes: str, dtype: jnp.dtype) -> jax.Array:
  if name + SCALE not in cache:
    return cache[name]
  feature_axis = next(i for i, axis in enumerate(axes.split()) if axis in FEATURES)
  scale = jnp.expand_dims(cache[name + SCALE], feature_axis)
  return (cache[name].astype(jnp.float32) * scale).astype(dtype)


def to_int8(x_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(integers, their scales), by the last axis."""
  x_BT = x_BT.astype(jnp.float32)
  scale_BT = jnp.max(jnp.abs(x_BT), -1) / MAX_INT8
  steps_BT = jnp.round(x_BT / jnp.where(scale_BT > 0, scale_BT, 1.0)[..., None])
  return steps_BT.astype(jnp.int8), scale_BT


def shapes(x_BT: jax.ShapeDtypeStruct, name: str, axes: str, dtype: str) -> dict:
  """By name, (shape of a position [1, 1, ...], dtype, axes) of what is kept as `name`."""
  if dtype != "int8":
    return {name: (x_BT.shape, x_BT.dtype, axes)}
  scale = x_BT.shape[:-1], jnp.float32, axes_of_scale(axes)
  return {name: (x_BT.shape, jnp.int8, axes), name + SCALE: scale}
