"""Products of activations with weights, and functions that the backward pass computes again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.nn import layers
from distill_jax.nn.products import product, recomputed

# x, w, and the number of contracted axes: queries' heads, the output of heads, a feed-forward.
SHAPES = (((2, 5, 8), (8, 3, 4), 1), ((2, 5, 3, 4), (3, 4, 8), 2), ((2, 4, 5, 8), (8, 6), 1))


def mesh_of(devices):
  return jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])


@pytest.mark.parametrize("devices", (1, 2))
@pytest.mark.parametrize(("x_shape", "w_shape", "contracted"), SHAPES)
def test_products_and_gradients_equal_those_of_float64(x_shape, w_shape, contracted, devices):
  rng = np.random.default_rng(0)
  positions = x_shape[: len(x_shape) - contracted]
  x, w = rng.normal(size=x_shape), rng.normal(size=w_shape)
  dy = rng.normal(size=positions + w_shape[contracted:])
  with jax.set_mesh(mesh_of(devices)):
    y, backward = jax.vjp(lambda x, w: product(x, w, contracted), *map(jnp.float32, (x, w)))
    dx, dw = backward(jnp.float32(dy))
  # Sums of at most 40 products of numbers below 4, in float32.
  close = {"rtol": 0, "atol": 1e-5}
  np.testing.assert_allclose(y, np.tensordot(x, w, contracted), **close)
  free = range(len(positions), dy.ndim), range(contracted, w.ndim)
  np.testing.assert_allclose(dx, np.tensordot(dy, w, free), **close)
  free = range(len(positions)), range(len(positions))
  np.testing.assert_allclose(dw, np.tensordot(x, dy, free), **close)


@pytest.mark.parametrize("devices", (1, 2))
def test_only_one_device_merges_the_axes_of_positions(devices):
  """Two contracted axes in the gradient of a weight are what XLA for CPUs is slow at."""
  x_BTD, w_DF = jnp.ones((2, 5, 8)), jnp.ones((8, 6))
  with jax.set_mesh(mesh_of(devices)):
    jaxpr = jax.make_jaxpr(jax.grad(lambda w: product(x_BTD, w).sum()))(w_DF)
  products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
  (over_lhs, _), _ = products[-1].params["dimension_numbers"]
  assert len(over_lhs) == devices


def test_the_backward_pass_keeps_only_the_arguments():
  def kept(fn):
    _, backward = jax.vjp(fn, jnp.ones((2, 5)), jnp.full((2, 5), 2.0))
    return sum(x.shape == (2, 5) for x in jax.tree.leaves(backward))

  gated = lambda gate, up: jax.nn.silu(gate) * up
  assert kept(gated) > 2
  assert kept(lambda *args: recomputed(gated, *args)) == 2


@pytest.mark.parametrize("norm", ("rms_norm", "layer_norm"))
def test_norms_keep_only_their_input(norm):
  vectors = [jnp.ones(8)] * (2 if norm == "layer_norm" else 1)
  fn = lambda x_BTD: getattr(layers, norm)(x_BTD, *vectors, 1e-6)
  _, backward = jax.vjp(fn, jax.random.normal(jax.random.key(0), (2, 5, 8)))
  assert sum(x.shape[:2] == (2, 5) for x in jax.tree.leaves(backward)) == 1
