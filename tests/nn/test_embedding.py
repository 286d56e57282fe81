"""The gradient of an embedding table: a sum in float32, on one device and on a mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.nn import embedding, sharding

B, T, D, V = 4, 512, 16, 8


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 2, 1, 1), (1, 2, 2, 1), (1, 2, 1, 2)])
def test_the_gradient_of_a_frequent_token_is_exact(shape):
  """Sums in bfloat16 would stop growing at 256 times an element; a sum of 2,048 is rounded once.

  Devices exchange the gradients of positions, and gather none of them.
  """
  rng = np.random.default_rng(0)
  tokens = rng.choice(V, (B, T), p=[0.9, 0.05, 0.05, *[0] * (V - 3)])
  grad = rng.uniform(0.5, 1, (B, T, D)).astype(jnp.bfloat16)
  want = np.zeros((V, D))
  np.add.at(want, tokens, grad.astype(np.float64))
  mesh = sharding.make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])
  rules = sharding.Rules()

  def gradient(table_VD, tokens_BT, grad_BTD):
    axes = ("vocab", "table")
    gathered = sharding.gather(table_VD, axes, rules)
    rows = lambda table_VD: embedding.lookup(table_VD, tokens_BT, axes, rules)
    return jax.vjp(rows, gathered)[1](grad_BTD)[0]

  with jax.set_mesh(mesh):
    placed = jax.device_put((tokens, grad), sharding.batch_sharding(mesh, 1))
    args = jnp.zeros((V, D), jnp.bfloat16), *placed
    stored = jax.NamedSharding(mesh, rules.spec(("vocab", "table"), "storage"))
    compiled = jax.jit(gradient, out_shardings=stored).lower(*args).compile()
    got = compiled(*args)
  assert not re.findall(r"= (?:b?f\d+)\S* all-gather", compiled.as_text())
  np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8)
