"""The grids of numbers on which the weights of small files are stored.

A row of inputs is divided into groups. The numbers of a group are stored as integers q and one
scale s, and stand for q * s:

  int8, int4  compressed-tensors: s in bfloat16, the largest |x| divided by 127 or 7.
  Q8_0        GGUF: groups of 32, s in float16, the largest |x| divided by 127.
  Q4_0        GGUF: groups of 32, s in float16, the number with the largest |x| divided by -8.

Q8_0 and Q4_0 have the very bits that gguf.quants computes, as the reference of ggml does
(ggml-quants.c): it divides by the scale before this is rounded to float16. The operations are
chosen so that no compiler combines two of them into one with another rounding.

The same functions serve training and export, so a file has exactly the numbers of the training.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

GGUF = ("Q8_0", "Q4_0")
PACKED = ("int8", "int4")
GRIDS = (*PACKED, *GGUF)
BLOCK = 32  # inputs that share a scale in GGUF
BITS = {"int8": 8, "int4": 4, "Q8_0": 8, "Q4_0": 4}
LARGEST = {"int8": 127, "int4": 7, "Q8_0": 127, "Q4_0": 8}


def inputs_per_scale(grid: str, group: int, inputs: int) -> int:
  """Returns the number of inputs that share a scale, of rows with `inputs` inputs."""
  return BLOCK if grid in GGUF else group or inputs


def encode(x: jax.Array, grid: str, group: int = 0) -> tuple[jax.Array, jax.Array]:
  """Returns numbers as integers with scales.

  Args:
    x: the numbers [..., inputs], in float32.
    grid: one of GRIDS.
    group: the number of inputs that share a scale, for "int8" and "int4"; 0: all of a row.

  Returns:
    (int8 [..., inputs], scales [..., groups] in bfloat16, or in float16 for GGUF).
  """
  inputs = x.shape[-1]
  group = inputs_per_scale(grid, group, inputs)
  grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], inputs // group, group)
  q, scale = {"Q8_0": _q8_0, "Q4_0": _q4_0}.get(grid, _symmetric)(grouped, LARGEST[grid])
  return q.reshape(x.shape), scale[..., 0]


def decode(q: jax.Array, scale: jax.Array, group: int = 0) -> jax.Array:
  """Returns the numbers for which integers and scales stand, in float32.

  Args:
    q: the integers [..., inputs].
    scale: the scales [..., groups].
    group: the number of inputs that share a scale; 0: all of a row.
  """
  group = group or q.shape[-1]
  grouped = q.astype(jnp.float32).reshape(*q.shape[:-1], -1, group)
  return (grouped * scale.astype(jnp.float32)[..., None]).reshape(q.shape)


def on_grid(x: jax.Array, grid: str, group: int = 0) -> jax.Array:
  """Returns the numbers [..., inputs] rounded to the grid, in float32."""
  q, scale = encode(x, grid, group)
  return decode(q, scale, inputs_per_scale(grid, group, x.shape[-1]))


def _symmetric(x: jax.Array, largest: int) -> tuple[jax.Array, jax.Array]:
  scale = _scale(jnp.max(jnp.abs(x), -1, keepdims=True), largest).astype(jnp.bfloat16)
  steps = jnp.round(x * _inverse(scale.astype(jnp.float32)))
  return jnp.clip(steps, -largest, largest).astype(jnp.int8), scale


def _q8_0(x: jax.Array, largest: int) -> tuple[jax.Array, jax.Array]:
  scale = _scale(jnp.max(jnp.abs(x), -1, keepdims=True), largest)
  steps = jnp.abs(x * _inverse(scale))
  whole = jnp.floor(steps)
  whole += steps - whole >= 0.5  # ties away from zero; lax.round adds 0.5, which rounds
  return (jnp.sign(x) * whole).astype(jnp.int8), scale.astype(jnp.float16)


def _q4_0(x: jax.Array, largest: int) -> tuple[jax.Array, jax.Array]:
  first = jnp.argmax(jnp.abs(x), -1, keepdims=True)
  scale = jnp.take_along_axis(x, first, -1) / -largest
  steps = jnp.clip(x * _inverse(scale), -largest, largest)  # between product and sum
  steps = jnp.floor(steps + (largest + 0.5))
  return (jnp.minimum(steps, 2 * largest - 1) - largest).astype(jnp.int8), scale.astype(jnp.float16)


def _inverse(scale: jax.Array) -> jax.Array:
  """Returns 1 / scale, and 0 for a scale of 0."""
  return jnp.where(scale == 0, 0.0, 1 / jnp.where(scale == 0, 1.0, scale))


def _scale(largest_x: jax.Array, largest: int) -> jax.Array:
  """Returns the quotient; XLA would multiply by the inverse of a constant, which rounds twice."""
  return largest_x / jnp.where(largest_x > 0, jnp.float32(largest), 1.0)
