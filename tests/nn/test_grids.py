"""The grids of stored weights: the bytes of the gguf package, and the formulas in torch."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from distill_jax.nn import grids


def packed(x, grid):
  """Returns the blocks of a GGUF file, as ggml lays them out."""
  q, scale = (np.asarray(a) for a in jax.jit(grids.encode, static_argnums=1)(x, grid))
  q, scale = q.reshape(-1, 32), scale.reshape(-1, 1).view(np.uint8)
  if grid == "Q8_0":
    return np.concatenate([scale, q.view(np.uint8)], 1)
  nibbles = (q + 8).astype(np.uint8)
  return np.concatenate([scale, nibbles[:, :16] | nibbles[:, 16:] << 4], 1)


def values():
  """Returns rows with numbers of many sizes, ties, blocks of zeros and float16's subnormals."""
  r = np.random.default_rng(0)
  normal = r.standard_normal((200, 256)).astype(np.float32)
  rows = [
    normal,
    normal * np.float32(1e-4),  # the scales are subnormal
    normal.astype(jnp.bfloat16).astype(np.float32),  # many quotients near a tie
    normal**5,
    r.integers(-8, 9, normal.shape) / np.float32(16),  # both signs of the largest number
    r.integers(-127, 128, normal.shape) * np.float32(0.5),
    np.zeros((2, 256), np.float32),
  ]
  return np.concatenate(rows).astype(np.float32)


@pytest.mark.parametrize("grid", grids.GGUF)
def test_the_bytes_are_those_of_the_gguf_package(grid):
  x = values()
  kind = getattr(gguf.GGMLQuantizationType, grid)
  stored = gguf.quants.quantize(x, kind)
  np.testing.assert_array_equal(packed(x, grid), stored.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1]))
  np.testing.assert_array_equal(grids.on_grid(x, grid), gguf.quants.dequantize(stored, kind))


@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("grid", grids.PACKED)
def test_integers_with_a_bfloat16_scale(grid, group):
  x = values()
  q, scale = jax.jit(grids.encode, static_argnums=(1, 2))(x, grid, group)
  rows, most = torch.tensor(x.reshape(-1, group or 256)), {"int8": 127, "int4": 7}[grid]
  want = (rows.abs().amax(1, keepdim=True) / most).bfloat16()
  np.testing.assert_array_equal(np.asarray(scale, np.float32).reshape(-1), want.float()[:, 0])
  # Where torch divides by the scale, a tie may fall on the other side.
  inverse = torch.where(want > 0, 1 / want.float(), 0)
  steps = torch.round(rows * inverse).clamp(-most, most)
  np.testing.assert_array_equal(q.reshape(rows.shape), steps)
  np.testing.assert_array_equal(grids.decode(q, scale, group).reshape(rows.shape), steps * want)
