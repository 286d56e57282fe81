"""Which blocks splash attention visits, for queries in any order, and compiled for TPUs."""

import functools
import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import SCALE, arrays, by_hand
from numpy.testing import assert_allclose, assert_array_equal

from distill_jax.nn import dense, splash

BLOCK = splash.LANES


@pytest.fixture
def small_blocks(monkeypatch):
  """Gives short rows several blocks."""
  monkeypatch.setattr(splash, "BLOCKS", (BLOCK,))


def seen_pairs(segments_T, index_Q, window):
  """Returns the mask [Q, K] of one row, in numpy."""
  back = index_Q[:, None] - np.arange(len(segments_T))
  near = (back >= 0) & (back < (window or len(segments_T)))
  return near & (segments_T[index_Q][:, None] == segments_T)


def segments_of(kind, T):
  """Returns two different rows of segments: 1, 2, … and 0 for padding."""
  t = np.arange(T)
  rows = {
    "one": [np.ones(T), np.where(t < T - 150, 1, 0)],
    "many short": [1 + t // 9, np.where(t < T // 2, 1 + t // 40, 0)],
    "short and long": [1 + (t >= 20) + (t >= T - 150), 1 + (t >= 140) + (t >= 141)],
  }
  return np.stack(rows[kind]).astype(np.int32)


@pytest.mark.parametrize("kind, window", [("many short", None), ("short and long", 140)])
def test_skipped_blocks_have_no_effect(kind, window, small_blocks):
  """Values and gradients match float64 where most blocks are skipped."""
  q, k, v, _, out_grad = arrays(512, 2, 1, 16, 8)
  segments = segments_of(kind, 512)

  @jax.jit
  def both(q, k, v):
    index_T, at = jnp.arange(512), jnp.int32(0)
    of = lambda q, k, v: splash.attention(
      q, k, v, segments, segments, index_T, at, (window,), SCALE, 512, interpret=True
    )
    out, pull = jax.vjp(of, q, k, v)
    return out, *pull(out_grad)

  for got, want in zip(both(q, k, v), by_hand(q, k, v, segments, out_grad, window), strict=True):
    assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, chunk", [("splash", 128), ("splash", 75), ("dense", 75)])
def test_chunks_of_two_devices_add_up_to_the_rows(name, chunk, small_blocks):
  """Each device has a chunk of queries from the front and one from the back, and all keys."""
  T, window = 4 * chunk, chunk + 20
  q, k, v, segments, out_grad = arrays(T, 2, 1, 16, 8)
  inner = {
    "splash": functools.partial(splash.attention, chunk=chunk, interpret=True),
    "dense": dense.attention,
  }[name]

  @jax.jit
  def on_device(index_Q):
    def of(q, k, v):
      both = q, k, v, jnp.asarray(segments)[:, index_Q], segments
      return inner(*both, index_Q, jnp.int32(1), (None, window), SCALE)

    out, pull = jax.vjp(of, jnp.asarray(q)[:, index_Q], k, v)
    return out, *pull(jnp.asarray(out_grad)[:, index_Q])

  out, q_grad, k_grad, v_grad = (np.zeros_like(x) for x in (out_grad, q, k, v))
  for first, second in ((0, 3), (1, 2)):
    index_Q = np.r_[first * chunk : (first + 1) * chunk, second * chunk : (second + 1) * chunk]
    out[:, index_Q], q_grad[:, index_Q], dk, dv = on_device(index_Q.astype(np.int32))
    k_grad += dk
    v_grad += dv
  want = by_hand(q, k, v, segments, out_grad, window)
  for a, b in zip((out, q_grad, k_grad, v_grad), want, strict=True):
    assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def count(shape, *indices):
  """Returns how often each index occurs."""
  counts = np.zeros(shape, int)
  np.add.at(counts, indices, 1)
  return counts


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def steps_of(segments_BT, index_Q, window, queries, keys):
  """Returns the lists of steps, with blocks of BLOCK."""
  ends = splash.visited_blocks(segments_BT, index_Q, window, BLOCK, BLOCK)
  blocks = segments_BT.shape[1] // BLOCK
  return splash.key_blocks(*ends, keys, blocks), splash.query_blocks(*ends, queries, blocks)


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("order", ["natural", "zig-zag"])
def test_steps_visit_exactly_the_blocks_with_a_pair(order, window):
  """A direct count in numpy; a step without a visit names a block that exists."""
  T = 1_024
  index_Q = np.arange(T) if order == "natural" else np.r_[:256, T - 256 : T]
  I, J = len(index_Q) // BLOCK, T // BLOCK
  # 300 positions before a block of 128 are in at most 4 blocks.
  queries, keys = (I, J) if window is None else (4, 4)
  for kind in ("one", "many short", "short and long"):
    segments = segments_of(kind, T)
    seen = np.stack([seen_pairs(row, index_Q, window) for row in segments])
    want = seen.reshape(2, I, BLOCK, J, BLOCK).any((2, 4))
    lists = steps_of(segments, index_Q, window, queries, keys)
    of_queries, of_keys = ([np.asarray(x) for x in pair] for pair in lists)
    b, i, s = np.nonzero(of_queries[1].reshape(2, I, keys))
    blocks = of_queries[0].reshape(2, I, keys)
    assert_array_equal(count(want.shape, b, i, blocks[b, i, s] - b * J), want)
    assert blocks.min() >= 0 and blocks.max() < 2 * J
    s, b, j = np.nonzero(of_keys[1].reshape(queries, 2, J))
    blocks = of_keys[0].reshape(queries, 2, J)
    assert_array_equal(count(want.shape, b, blocks[s, b, j] - b * I, j), want)
    assert blocks.min() >= 0 and blocks.max() < 2 * I


TPU = """
from distill_jax.preflight import topology
topology.prepare()
import json, re, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from distill_jax.nn import attention
from distill_jax.nn.sharding import MeshOptions
mesh = topology.make_mesh(MeshOptions(fsdp=2, tensor=2), "v5e:2x2")
of = lambda dtype, *shape, spec: jax.ShapeDtypeStruct(
  shape, dtype, sharding=NamedSharding(mesh, spec))
heads = lambda n, h: of(
  jnp.bfloat16, 4, 1000, n, h, spec=P(("data", "fsdp"), None, "tensor", None))
args = (heads(8, 192), heads(4, 192), heads(4, 128),
  of(jnp.int32, 4, 1000, spec=P(("data", "fsdp"))), of(jnp.int32, spec=P()))
def loss(q, k, v, segments, at):
  a = attention.attention(q, k, v, segments, attention.OneOf((None, 512), at))
  return jnp.sum(a.astype(jnp.float32) ** 2)
with jax.set_mesh(mesh):
  text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*args).compile().as_text()
sent = r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\\("
kernels = r"splash_mha_(?:fwd|dq|dkv)\\w*"
print(json.dumps({
  "sent": re.findall(sent, text),
  "kernels": sorted(set(re.findall(kernels, text))),
  "calls": text.count('custom_call_target="tpu_custom_call"'),
}))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_splash_compiles_for_a_tpu_without_communication():
  """Covers four v5e chips, both passes, two windows, and values narrower than keys."""
  done = subprocess.run([sys.executable, "-c", TPU], capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads(done.stdout.splitlines()[-1])
  assert found["sent"] == []
  assert [k.split("_")[2] for k in found["kernels"]] == ["dkv", "dq", "fwd"]
  assert all("segmented" in k for k in found["kernels"])
  assert found["calls"] == 6  # three kernels per window


LONG = """
import sys
from distill_jax.preflight import topology
topology.prepare()
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from distill_jax.nn import splash
from distill_jax.nn.sharding import MeshOptions
T = int(sys.argv[1])
mesh = topology.make_mesh(MeshOptions(fsdp=4), "v5p:2x2x1")
of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))
args = (of(jnp.bfloat16, 2, T, 2, 192), of(jnp.bfloat16, 2, T, 1, 192),
  of(jnp.bfloat16, 2, T, 1, 128), of(jnp.int32, 2, T), of(jnp.int32))
def loss(q, k, v, segments, at):
  index_T = jnp.arange(T, dtype=jnp.int32)
  a = splash.attention(q, k, v, segments, segments, index_T, at, (None, 1_000), 0.1, T)
  return jnp.sum(a.astype(jnp.float32) ** 2)
grads = jax.shard_map(jax.grad(loss, argnums=(0, 1, 2)), in_specs=P(), out_specs=P(),
  check_vma=False)
with jax.set_mesh(mesh):
  compiled = jax.jit(grads).lower(*args).compile()
print(compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("T", [32_768, 131_072])
def test_long_rows_compile_for_a_tpu(T):
  """Both passes fit scalar and vector memory, and what they store grows with T, not its square."""
  done = subprocess.run(
    [sys.executable, "-c", LONG, str(T)], capture_output=True, text=True, timeout=600
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert int(done.stdout.split()[-1]) < 2 * T * 20_000
