"""Checksums of arrays, which are the same on every mesh and add up over parts of an array."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.types import PyTree


def of_arrays(tree: PyTree) -> PyTree:
  """Returns a checksum of each array: two uint32, the sums of hashed elements.

  The bits of each element are hashed with its index by bijections, so that a change of one element
  always changes the sums. Sums modulo 2^32 do not depend on the order of addition, so that the
  checksum is the same on every mesh.
  """
  # One array at a time: arrays of one shape share a program, and concurrent programs over all
  # devices can deadlock on CPU.
  return jax.tree.map(lambda x: np.asarray(part_sums(x)), tree)


@jax.jit
def part_sums(x: jax.Array, start: jax.Array | None = None) -> jax.Array:
  """Returns the part of an array's checksum that its elements from index `start` on make up.

  The checksum of the array is the sum, modulo 2^32, of those of its parts.
  """
  bits = x.view(f"uint{8 * x.dtype.itemsize}") if x.dtype != bool else x
  bits = bits.astype(jnp.uint32)
  for axis in range(x.ndim):
    place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    if start is not None:
      place = place + start[axis]
    bits = _scramble(bits + place * jnp.uint32(0x9E3779B1))
  # Two sums in one reduction take a sixth of the time of two reductions on a CPU.
  both, zeros = (_scramble(bits), _scramble(bits ^ 1)), (jnp.uint32(0), jnp.uint32(0))
  sums = jax.lax.reduce(both, zeros, _add, range(x.ndim))
  return jnp.stack(sums)


def _add(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple:
  return a[0] + b[0], a[1] + b[1]


def _scramble(x: jax.Array) -> jax.Array:
  """Returns the finaliser of MurmurHash3 (Appleby, public domain), a bijection of uint32."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
