"""Checksums of arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.nn import sharding
from distill_jax.runtime import checksums


def test_checksums_do_not_depend_on_the_mesh():
  x = jax.random.normal(jax.random.key(0), (8, 16, 4))
  want = checksums.of_arrays(x)
  for shape, spec in (
    ((2, 2), ("fsdp", "tensor")),
    ((4, 1), (None, "fsdp")),
    ((1, 4), ("tensor",)),
  ):
    mesh = sharding.make_mesh(fsdp=shape[0], tensor=shape[1])
    y = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    np.testing.assert_array_equal(checksums.of_arrays(y), want)
  assert not np.array_equal(checksums.of_arrays(x.reshape(16, 8, 4)), want)
  assert not np.array_equal(checksums.of_arrays(x[::-1]), want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "int8", "bool"])
def test_every_flipped_bit_changes_the_checksum(dtype):
  x = np.arange(24).reshape(4, 6).astype(jnp.dtype(dtype))
  seen = {tuple(np.asarray(checksums.of_arrays(jnp.asarray(x))))}
  flips = [1 << b for b in range(8)] if dtype != "bool" else [1]
  for byte in range(x.nbytes):
    for flip in flips:
      y = x.copy()
      y.view(np.uint8).reshape(-1)[byte] ^= flip
      seen.add(tuple(np.asarray(checksums.of_arrays(jnp.asarray(y)))))
  assert len(seen) == 1 + x.nbytes * len(flips)
