"""What a layer keeps of positions while it decodes, as it is or as integers of 8 bits.

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
SCALE = "_scale"  # an array of scales is called as what it scales, and this

LayerCache = dict[str, jax.Array]
Axes = dict[str, str]  # of Block.CACHE


def axes_of_scale(axes: str) -> str:
  """As `axes`, the features gone."""
  return " ".join(a for a in axes.split() if a not in FEATURES)


def write(
  kept: LayerCache, new: LayerCache, slots_BT: jax.Array, axes: Axes, rules: sharding.Rules
) -> LayerCache:
  """The cache with T new positions [B, T, ...] in their slots."""
  out: LayerCache = {}

  def one(name: str, x_BT: jax.Array, of: str) -> None:
    x = attention.write_slots(kept[name], x_BT, slots_BT, of.split().index("seq"))
    out[name] = sharding.constrain(x, of, rules)

  for name, x_BT in new.items():
    if name + SCALE in kept:
      x_BT, scale_BT = to_int8(x_BT)
      one(name + SCALE, scale_BT, axes_of_scale(axes[name]))
    one(name, x_BT, axes[name])
  return out


def read(kept: LayerCache, axes: Axes, dtype: jnp.dtype) -> LayerCache:
  """The cache as numbers of the compute dtype, by the names in CACHE."""
  return {name: _read(kept, name, of, dtype) for name, of in axes.items()}


def _read(kept: LayerCache, name: str, axes: str, dtype: jnp.dtype) -> jax.Array:
  if name + SCALE not in kept:
    return kept[name]
  at = next(i for i, axis in enumerate(axes.split()) if axis in FEATURES)
  scale = jnp.expand_dims(kept[name + SCALE], at)
  return (kept[name].astype(jnp.float32) * scale).astype(dtype)


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
