"""The int8 cache: its error by its formula, its size, and rows that know nothing of each other."""

import decoding
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow

from distill_jax.generation.unrolled import empty_cache, unroll
from distill_jax.nn import fused_head, kv_cache
from distill_jax.types import Inputs

KINDS = ["llama", "deepseek_v3"]


def test_the_int8_error_is_at_most_half_a_step():
  """A step is the largest number of a position and head, divided by 127; that number is exact."""
  rng = np.random.default_rng(0)
  x_BTGh = np.float32(rng.normal(size=(2, 7, 3, 16)) * 10.0 ** rng.integers(-4, 4, (2, 7, 3, 1)))
  x_BTGh[0, 0, 0] = 0
  steps, scale_BTG = kv_cache.to_int8(jnp.asarray(x_BTGh))
  most_BTG = np.abs(x_BTGh).max(-1)
  assert steps.dtype == jnp.int8 and np.abs(steps).max() == 127
  np.testing.assert_allclose(scale_BTG, most_BTG / 127, rtol=1e-6)
  off = np.abs(np.float64(steps) * np.float64(scale_BTG)[..., None] - x_BTGh)
  # Half a step, and three float32 roundings of numbers up to `most`.
  assert (off <= most_BTG[..., None] * (0.5 / 127 + 2e-7)).all()
  assert (off.max(-1) > most_BTG * 0.3 / 127)[most_BTG > 0].all()  # not more than 8 bits


def test_blocks_of_slots():
  """There are at most 8 blocks, of 128 slots or a multiple, and the last has the rest."""
  assert kv_cache.block_sizes(100, "cpu") == (100,)
  assert kv_cache.block_sizes(1_000, "tpu") == (128,) * 7 + (104,)
  assert kv_cache.block_sizes(4_097, "tpu") == (640,) * 6 + (257,)
  assert kv_cache.block_sizes(4_097, "gpu") == (4_097,)


@pytest.mark.parametrize("family", KINDS)
def test_the_int8_cache_follows_the_formula(family):
  """An int8 cache has the numbers of an ordinary one within half a step, and is smaller."""
  model, mesh = (
    unroll(decoding.copied(decoding.random_model(family)), decoding.COMPUTE),
    (decoding.one_device()),
  )
  tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 256)
  inputs = Inputs(tokens, jnp.broadcast_to(jnp.arange(9), (2, 9)), jnp.ones_like(tokens))
  empty = lambda dtype: empty_cache(model, 2, 12, decoding.COMPUTE, mesh, dtype)
  with jax.set_mesh(mesh):
    extend = jax.jit(lambda m, i, c: m.decode_step(i, c, decoding.COMPUTE))
    (out, kept), (small_out, small) = (extend(model, inputs, empty(d)) for d in ("", "int8"))
  axes = model.blocks[0].CACHE
  first = kv_cache.read(small[0], axes, jnp.float32, 0)
  assert first.keys() == kept[0].keys() == axes.keys()
  kept = [{name: x for name, (x,) in layer.items()} for layer in kept]  # one block
  for name, x in kept[0].items():  # the first layer reads the same in both
    at = next(i for i, a in enumerate(axes[name].split()) if a in kv_cache.FEATURES)
    most = np.abs(x).max(at, keepdims=True)
    assert (np.abs(first[name] - x) <= most * (0.5 / 127 + 2e-7)).all(), name
  numbers = sum(x.size for layer in kept for x in layer.values())
  wide = {
    n: x.shape[axes[n].split().index("head_dim" if n != "latent" else "latent")]
    for n, x in kept[0].items()
  }
  scales = sum(x.size // wide[n] for layer in kept for n, x in layer.items())
  assert sum(x.nbytes for x in jax.tree.leaves(small)) == numbers + 4 * scales
  exact, near = (fused_head.logits(o.hidden_BTD, o.head_VD) for o in (out, small_out))
  off = np.abs(exact - near).max() / np.abs(exact).max()
  # Errors of up to 0.4% of the largest number in two layers: 0.024 observed for the worst family.
  # With 4 bits it would be 16 times larger.
  assert 0 < off < 0.05


@pytest.mark.parametrize("family", ["llama", slow.param("deepseek_v3")])
def test_tokens_do_not_depend_on_the_batch(family):
  """Sampled tokens are the same in batches of different sizes; a rerun also has equal logps."""
  model, read = decoding.random_model(family), decoding.prompts(256)
  runs = [
    decoding.decode(
      model, decoding.one_device(), decoding.DRAWN, read, rows=rows, fill=fill, cache_dtype="int8"
    )
    for rows, fill in ((3, 2), (1, 1), (3, 2))
  ]
  for other in runs[1:]:
    assert {k: s.tokens for k, s in other.items()} == {k: s.tokens for k, s in runs[0].items()}
  assert all(runs[2][k].logps == s.logps for k, s in runs[0].items())
  plain = decoding.decode(model, decoding.one_device(), decoding.DRAWN, read)
  assert any(plain[k].logps != s.logps for k, s in runs[0].items())
