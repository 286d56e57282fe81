"""Tests of the sampler against float64 numpy, and with a sharded vocabulary."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.errors import InputError
from distill_jax.nn import sharding
from distill_jax.records import sampler, selection
from distill_jax.records.sampler import SamplerSpec


def softmax(logits):
  e = np.exp(logits - logits.max(-1, keepdims=True), dtype=np.float64)
  return e / e.sum(-1, keepdims=True)


def reference(logits, u, n):
  """Returns the tokens whose intervals of the cumulative sum contain (u + j)/n, in float64."""
  ends = np.cumsum(softmax(logits.astype(np.float64)), -1)
  x = (u[..., None].astype(np.float64) + np.arange(n)) / n * ends[..., -1:]
  return (ends[..., None, :] <= x[..., None]).sum(-1)


systematic = jax.jit(selection.systematic, static_argnums=2)
dense_program = jax.jit(
  lambda *args, spec: sampler.summarise(*args, spec, chunk=4), static_argnames="spec"
)


def draw(logits, u, n):
  return np.asarray(systematic(np.float32(logits), np.float32(u), n))


LOGITS = {
  "flat": np.zeros(7),
  "steep": np.array([0.0, -1, -2, -4, -8, -16, 3, 2.5, 2]),
  "long": np.random.default_rng(0).normal(0, 3, 300),
  "one past a block": np.random.default_rng(1).normal(0, 2, 257),
}


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("n", [1, 5, 63])
def test_expected_counts_over_offsets_are_the_probabilities(name, n):
  """Counts are constant between offsets at which a point reaches the end of an interval."""
  p = softmax(LOGITS[name])
  breaks = np.unique(np.concatenate([[0, 1], np.cumsum(p) * n % 1]))
  middles = (breaks[1:] + breaks[:-1]) / 2
  ids = draw(np.tile(LOGITS[name], (1, len(middles), 1)), middles[None], n)[0]
  counts = np.stack([np.bincount(row, minlength=len(p)) for row in ids])
  mean = (np.diff(breaks)[:, None] * counts).sum(0) / n
  np.testing.assert_allclose(mean, p, atol=3e-6)
  assert np.abs(counts - n * p).max() < 1 + 1e-4


@pytest.mark.parametrize("V", [3, 256, 1000, 5003])
def test_float64_reference(V):
  rng = np.random.default_rng(V)
  logits = rng.normal(0, 3, (2, 16, V)).astype(np.float32)
  u = rng.random((2, 16), np.float32)
  ids, want = draw(logits, u, 63), reference(logits, u, 63)
  assert ids.dtype == np.int32
  assert np.all(np.diff(ids, axis=-1) >= 0)
  assert (ids != want).mean() < 2e-3  # ties of float32
  # Where they differ, the point lies within rounding of the end of an interval.
  ends = np.cumsum(softmax(logits.astype(np.float64)), -1)
  x = (u[..., None] + np.arange(63)) / 63
  for b, t, j in zip(*np.nonzero(ids != want), strict=True):
    assert np.abs(ends[b, t] - x[b, t, j]).min() < 2e-6


@pytest.mark.parametrize("at", [0, 255, 256, 511, 777])
@pytest.mark.parametrize("low", [-np.inf, -1e30, -200.0])
def test_a_one_hot_distribution_gives_only_its_token(at, low):
  logits = np.full((1, 3, 778), low)
  logits[..., at] = 50.0
  u = np.array([[0.0, 0.5, np.nextafter(np.float32(1), np.float32(0))]], np.float32)
  assert np.all(draw(logits, u, 63) == at)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4, 1e38])
def test_extreme_logits_never_leave_the_support(scale):
  rng = np.random.default_rng(0)
  logits = (rng.uniform(-1, 1, (1, 64, 1000)) * scale).astype(np.float32)
  logits[..., ::3] = -np.inf
  u = np.linspace(0, 1, 64, endpoint=False, dtype=np.float32)[None]
  u[0, -1] = np.nextafter(np.float32(1), np.float32(0))
  ids = draw(logits, u, 255)
  assert ids.min() >= 0
  assert ids.max() < 1000
  assert np.all(ids % 3 != 0)


def example(B=2, T=11, D=16, V=600, seed=0):
  rng = np.random.default_rng(seed)
  hidden = rng.normal(0, 1, (B, T, D)).astype(np.float32)
  head = rng.normal(0, 1, (V, D)).astype(np.float32)
  labels = rng.integers(0, V, (B, T)).astype(np.int32)
  return hidden, head, labels, rng.random((B, T), np.float32)


@pytest.mark.parametrize("chunk", [1, 4, 11, 64])
@pytest.mark.parametrize("vocab_size", [None, 517])
def test_summarise_against_float64(chunk, vocab_size):
  hidden, head, labels, u = example()
  labels %= 517
  spec = SamplerSpec(63, vocab_size=vocab_size, logp=True)
  run = jax.jit(lambda *a: sampler.summarise(*a, spec, chunk=chunk))
  out = run(hidden, head, labels, u)
  logits = (hidden.astype(np.float64) @ head.T)[..., :vocab_size]
  p = softmax(logits)
  pick = lambda ids: np.log(np.take_along_axis(p, ids, -1))
  assert (np.asarray(out["ids"]) != reference(logits, u, 63)).mean() < 2e-3
  np.testing.assert_allclose(out["entropy"], -(p * np.log(p)).sum(-1), rtol=2e-5, atol=2e-5)
  label_logp = pick(labels[..., None])[..., 0]
  np.testing.assert_allclose(out["label_logp"], label_logp, rtol=2e-5, atol=2e-5)
  np.testing.assert_allclose(out["logp"], pick(np.asarray(out["ids"])), rtol=2e-5, atol=2e-5)
  np.testing.assert_array_equal(out["argmax"], logits.argmax(-1))
  assert all(out[k].dtype == jnp.float32 for k in ("entropy", "label_logp", "logp"))
  assert all(out[k].dtype == jnp.int32 for k in ("ids", "argmax"))


def test_topk_and_temperature():
  hidden, head, labels, _ = example()
  spec = SamplerSpec(20, "topk", vocab_size=517, temperature=2.0)
  out = dense_program(hidden, head, labels, None, spec=spec)
  logp = np.log(softmax((hidden.astype(np.float64) @ head.T)[..., :517] / 2))
  want = np.argsort(-logp, -1)[..., :20]
  np.testing.assert_array_equal(out["ids"], want)
  np.testing.assert_allclose(out["logp"], np.take_along_axis(logp, want, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("V", [700, 5003])
def test_top_k_is_that_of_jax_with_ties(V):
  x = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 5, V)).astype(np.float32))
  for k in (1, 2, 17):
    both = jax.jit(lambda x, k=k: (selection.top_k(x, k), jax.lax.top_k(x, k)))
    for got, want in zip(*both(x), strict=True):
      np.testing.assert_array_equal(got, want)


def test_nucleus_keeps_the_fewest_entries_that_hold_the_mass():
  hidden, head, labels, _ = example()
  spec = SamplerSpec(40, "topk", nucleus=0.6)
  out = dense_program(hidden, head / 3, labels, None, spec=spec)
  p = np.sort(softmax(hidden.astype(np.float64) @ head.T / 3), -1)[..., ::-1]
  want = np.minimum((np.cumsum(p, -1) < 0.6).sum(-1) + 1, 40)
  got = np.isfinite(out["logp"]).sum(-1)
  np.testing.assert_array_equal(got, want)
  assert 1 <= got.min() < got.max() <= 40


def test_dense_is_top_k_of_all():
  hidden, head, labels, _ = example(V=30)
  every = dense_program(hidden, head, labels, None, spec=SamplerSpec(1, "dense"))
  top = dense_program(hidden, head, labels, None, spec=SamplerSpec(30, "topk"))
  jax.tree.map(np.testing.assert_array_equal, every, top)


def test_mesh_axes_of_other_names():
  if len(jax.devices()) < 4:
    pytest.skip("wants 4 devices")
  args, spec = example(B=2, T=10, V=4096), SamplerSpec(7, logp=True)
  auto = (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.make_mesh((2, 2), ("rows", "vocab"), auto, devices=jax.devices()[:4])
  with jax.set_mesh(mesh):
    run = jax.jit(
      lambda *a: sampler.summarise(*a, spec, chunk=4, batch_axes=("rows",), vocab_axis="vocab")
    )
    got = jax.device_get(run(*args))
  want = dense_program(*args, spec=spec)
  assert (got["ids"] != np.asarray(want["ids"])).mean() < 2e-3
  np.testing.assert_array_equal(got["argmax"], want["argmax"])
  np.testing.assert_allclose(got["entropy"], want["entropy"], rtol=1e-5, atol=1e-5)


def test_bad_input():
  hidden, head, labels, u = example()
  with pytest.raises(InputError, match="kind is 'text'; expected one of sampled, topk"):
    sampler.summarise(hidden, head, labels, u, SamplerSpec(4, "text"), chunk=4)
  with pytest.raises(InputError, match="u_BT is None; expected a uniform offset per position"):
    sampler.summarise(hidden, head, labels, None, SamplerSpec(4), chunk=4)
  with pytest.raises(InputError, match="n is 601; expected at least 1 and at most 600"):
    sampler.summarise(hidden, head, labels, None, SamplerSpec(601, "topk"), chunk=4)


def on_mesh(shape, spec):
  """Returns (outputs, compiled text) of summarise with a sharded batch and vocabulary."""
  mesh = sharding.make_mesh(*shape)
  args = example(B=2, T=10, V=4096)
  specs = [PartitionSpec(sharding.BATCH)] * 4
  specs[1] = PartitionSpec("tensor")
  with jax.set_mesh(mesh):
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(args, specs, strict=True)]
    run = jax.jit(lambda *a: sampler.summarise(*a, spec, chunk=4)).lower(*placed).compile()
    return jax.device_get(run(*placed)), run.as_text()


COLLECTIVE = re.compile(
  r"= (\S.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def collective_sizes(hlo):
  """Returns the size of the largest operand or result of each collective."""
  sizes = []
  for line in hlo.splitlines():
    if COLLECTIVE.search(line):
      shapes = re.findall(r"\w+\[([\d,]*)\]", line.split(", channel_id")[0].split("metadata")[0])
      sizes.append(max(int(np.prod([int(d) for d in s.split(",") if d])) for s in shapes))
  return sizes


@pytest.mark.parametrize("shape", [(1, 1, 4), (1, 2, 2), (2, 1, 2)])
@pytest.mark.parametrize("vocab_size", [4096, 4000, 900])
@pytest.mark.parametrize("kind", ["sampled", "topk"])
def test_sharded_equals_dense(shape, vocab_size, kind):
  if len(jax.devices()) < 4:
    pytest.skip("wants 4 devices")
  spec = SamplerSpec(63, kind, vocab_size=vocab_size, logp=True)
  out, _ = on_mesh(shape, spec)
  dense = dense_program(*example(B=2, T=10, V=4096), spec=spec)
  assert (out["ids"] != np.asarray(dense["ids"])).mean() < 2e-3
  assert out["ids"].max() < vocab_size
  assert np.all(np.diff(out["ids"], axis=-1) >= 0) or kind == "topk"
  np.testing.assert_array_equal(out["argmax"], dense["argmax"])
  same = out["ids"] == np.asarray(dense["ids"])
  for name in ("entropy", "label_logp"):
    np.testing.assert_allclose(out[name], dense[name], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(
    out["logp"][same], np.asarray(dense["logp"])[same], rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize("shape", [(1, 1, 4), (1, 2, 2)])
@pytest.mark.parametrize("kind", ["sampled", "topk"])
def test_no_collective_is_as_large_as_the_vocabulary(shape, kind):
  if len(jax.devices()) < 4:
    pytest.skip("wants 4 devices")
  n = 7
  _, hlo = on_mesh(shape, SamplerSpec(n, kind))
  sizes = collective_sizes(hlo)
  assert sizes, "a sharded vocabulary needs collectives: the parser found none"
  positions = 2 * 4  # of one chunk
  assert max(sizes) <= positions * n * 4
  assert max(sizes) < 4096 / 4  # less than one position's shard of logits
