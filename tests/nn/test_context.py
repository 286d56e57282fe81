"""Positions spread over the mesh axis `context`: equal values and gradients as on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import steps

from distill_jax import registry
from distill_jax.errors import InputError
from distill_jax.nn import attention, context, layers, sharding, splash
from distill_jax.nn.attention import OneOf
from distill_jax.types import Inputs

B, T = 2, 24
RULES = sharding.Rules()


def mesh_of(*shape):
  """A mesh of (data, fsdp, tensor, context)."""
  return sharding.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])


@pytest.mark.parametrize("C", [2, 3, 4])
def test_zigzag_order(C):
  """Device i holds chunks i and 2C - 1 - i, and back."""
  x_BT = np.arange(2 * 4 * C, dtype=np.int32).reshape(1, -1)
  chunks = [chunk for i in range(C) for chunk in (i, 2 * C - 1 - i)]
  want = x_BT.reshape(2 * C, 4)[chunks].reshape(1, -1)
  with jax.set_mesh(mesh_of(1, 1, 1, C)):
    there = jax.jit(lambda x: context.to_zigzag(x, "batch seq", RULES))(x_BT)
    back = jax.jit(lambda x: context.from_zigzag(x, "batch seq", RULES))(there)
  np.testing.assert_array_equal(there, want)
  np.testing.assert_array_equal(back, x_BT)


def test_without_a_context_axis_nothing_is_reordered():
  with jax.set_mesh(mesh_of(1, 2, 2, 1)):
    x_BT = jnp.ones((2, 3))
    assert context.to_zigzag(x_BT, "batch seq", RULES) is x_BT


def test_a_length_that_does_not_divide_is_refused():
  with (
    jax.set_mesh(mesh_of(1, 1, 1, 4)),
    pytest.raises(InputError, match="A sequence has 12 positions; expected a multiple of 8"),
  ):
    context.to_zigzag(jnp.ones((2, 12)), "batch seq", RULES)


def uneven_documents():
  segments_BT = np.ones((B, T), np.int32)
  segments_BT[0, 7:] = 2  # across chunks of all sizes
  segments_BT[0, 20:] = 0
  segments_BT[1, 1:] = 2
  segments_BT[1, 15:] = 3
  return Inputs.of(jnp.asarray(np.random.default_rng(0).integers(0, 256, (B, T))), segments_BT)


@functools.cache
def values_and_gradients(family, shape, mesh_shape):
  """Returns (hidden states, taps, gradients) of a decoder on a mesh."""
  module, inputs = registry.load("models", family), uneven_documents()
  mesh, compute = mesh_of(*mesh_shape), layers.ComputeConfig(remat="full")
  weight_BT1 = np.random.default_rng(1).normal(size=(B, T, 1)).astype(np.float32)

  def loss(model):
    out = model(inputs, compute, (1,))
    total = jnp.sum(out.hidden_BTD * weight_BT1) + jnp.sum(out.taps_PBTD[0] * weight_BT1)
    return total, (out.hidden_BTD, out.taps_PBTD)

  with jax.set_mesh(mesh):
    make = lambda key: module.Model(module.CONFIGS[shape], key)
    where = sharding.shardings(jax.eval_shape(make, jax.random.key(0)), mesh, RULES)
    model = jax.jit(make, out_shardings=where)(jax.random.key(0))
    grads, outputs = jax.jit(jax.grad(loss, has_aux=True))(model)
  return jax.device_get((*outputs, *jax.tree.leaves(grads)))


slow = pytest.mark.slow


@pytest.mark.parametrize(
  ("family", "shape", "mesh_shape"),
  [
    ("qwen2", "tiny-window", (1, 1, 2, 2)),
    pytest.param("qwen2", "tiny-window", (1, 1, 1, 4), marks=slow),
    pytest.param("llama", "tiny", (1, 2, 1, 2), marks=slow),
    pytest.param("gemma3", "tiny", (2, 1, 1, 2), marks=slow),
    pytest.param("qwen3", "tiny-moe", (1, 1, 2, 2), marks=slow),
    pytest.param("deepseek_v3", "tiny", (1, 1, 2, 2), marks=slow),
  ],
)
def test_decoders_are_the_same(family, shape, mesh_shape):
  """Gathered keys are summed in another order: a few units in the last place."""
  want = values_and_gradients(family, shape, (1, 1, 1, 1))
  for a, b in zip(values_and_gradients(family, shape, mesh_shape), want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@slow
@pytest.mark.parametrize("mesh_shape", [(1, 2, 1, 2)])
def test_training_steps_are_the_same(mesh_shape):
  """Three steps from recorded targets, with uneven masks and documents."""
  want_state, want_rows = steps.run(steps.make_step(), (1, 1, 1, 1))
  state, rows = steps.run(steps.make_step(), mesh_shape)
  for got, want in zip(rows, want_rows, strict=True):
    assert got == pytest.approx(want, rel=1e-5, abs=1e-6)
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(want_state), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1, np.abs(b).max()))


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 100, OneOf((None, 300), jnp.int32(1))])
def test_splash_attention_is_the_same(window, monkeypatch):
  """Pallas interprets its kernel on two devices, each with chunks of 128 of 512 positions."""
  rng, length = np.random.default_rng(0), 512
  q, k, v, grad = (
    jnp.asarray(rng.normal(size=(1, length, heads, 16)), jnp.float32) for heads in (4, 2, 2, 4)
  )
  segments = jnp.asarray(1 + (np.arange(length) >= 200) + (np.arange(length) >= 330))[None]
  segments = segments.astype(jnp.int32)

  def run(attend):
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(grad)

  dense = lambda q, k, v: attention.attention(q, k, v, segments, window, kernel="xla")
  want = jax.jit(lambda: run(dense))()
  monkeypatch.setattr(attention, "platform", lambda: "tpu")
  interpreted = functools.partial(splash.attention, interpret=True)
  monkeypatch.setattr(splash, "attention", interpreted)
  there = lambda x, heads: context.to_zigzag(x, f"batch seq {heads} head_dim", RULES)

  def spread(q, k, v):
    q, k, v = there(q, "heads"), there(k, "kv_heads"), there(v, "kv_heads")
    zigzag_segments = context.to_zigzag(segments, "batch seq", RULES)
    a = context.attend(q, (k, v), zigzag_segments, window, 0.25, "splash", RULES)
    return context.from_zigzag(a, "batch seq heads head_dim", RULES)

  with jax.set_mesh(mesh_of(1, 1, 1, 2)):
    got = jax.jit(lambda: run(spread))()
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_keys_on_other_devices_than_their_queries_are_refused():
  rules = sharding.rules({"kv_heads": ("", "")})
  with (
    jax.set_mesh(mesh_of(1, 1, 2, 2)),
    pytest.raises(InputError, match="Shard 'heads' and 'kv_heads' over the same"),
  ):
    q, segments = jnp.ones((1, 8, 2, 4)), jnp.ones((1, 8), jnp.int32)
    context.attend(q, (q, q), segments, None, 1.0, "xla", rules)
