"""Tests of feature losses against float64 numpy, and of layer pairs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.errors import InputError
from distill_jax.losses import features, hidden, relational, relations
from distill_jax.losses.features import Features, FeatureSpec
from distill_jax.models import deepseek_v3, llama
from distill_jax.nn.layers import ComputeConfig
from distill_jax.types import Batch, Inputs

B, T, D, E = 2, 9, 6, 10
KEY = jax.random.key(0)


def batch_of(mask, segments=None):
  ones = np.ones((B, T), np.int32) if segments is None else segments
  inputs = Inputs(*(jnp.asarray(x, jnp.int32) for x in (ones, ones, ones)))
  return Batch(inputs, inputs.tokens_BT, jnp.asarray(mask))


@pytest.fixture(scope="module")
def mask():
  m = np.random.default_rng(0).random((B, T)) < 0.7
  m[:, 0] = True
  return m


def vectors(seed, width):
  return np.random.default_rng(seed).normal(size=(B, T, width))


# ------------------------------------------------------------------ hidden states


@pytest.mark.parametrize("distance", hidden.DISTANCES)
def test_hidden_loss_matches_its_formula(distance, mask):
  s, t = [vectors(i, D) for i in (1, 2)], [vectors(i, D) for i in (3, 4)]
  if distance == "mse":
    per = [((a - b) ** 2).sum(-1) / (b**2).sum(-1) for a, b in zip(s, t, strict=True)]
  else:
    norm = lambda x: np.linalg.norm(x, axis=-1)
    per = [1 - (a * b).sum(-1) / norm(a) / norm(b) for a, b in zip(s, t, strict=True)]
  loss = hidden.Loss(distance=distance)
  student = Features({i: jnp.float32(x) for i, x in enumerate(s)}, {})
  teacher = Features({5 + i: jnp.float32(x) for i, x in enumerate(t)}, {})
  got = loss.feature_loss(student, teacher, {}, batch_of(mask), ((0, 5), (1, 6)))
  np.testing.assert_allclose(got.value(), np.mean(per, 0)[mask].mean(), rtol=1e-6)
  assert got.count == mask.sum()


def test_hidden_loss_does_not_depend_on_scale_width_or_number_of_pairs(mask):
  """The loss is the same with ten times the width, or with repeated pairs."""
  s, t = vectors(1, D), vectors(2, D)
  run = lambda s, t, n: (
    hidden.Loss()
    .feature_loss(
      Features({i: jnp.float32(s) for i in range(n)}, {}),
      Features({i: jnp.float32(t) for i in range(n)}, {}),
      {},
      batch_of(mask),
      tuple((i, i) for i in range(n)),
    )
    .value()
  )
  one = run(s, t, 1)
  np.testing.assert_allclose(run(np.tile(s, 10), np.tile(t, 10), 1), one, rtol=1e-6)
  np.testing.assert_allclose(run(s, t, 4), one, rtol=1e-6)


def test_least_squares_is_the_best_projection(mask):
  """A teacher that is a linear map of the student is matched exactly at unmasked positions."""
  s = vectors(1, D)
  t = s @ np.random.default_rng(5).normal(size=(D, E))
  t[~mask] = 1e3  # must not influence the fit
  shape = dataclasses.replace(llama.TINY, hidden_size=D, num_hidden_layers=1)
  loss = hidden.Loss(projection="least_squares", layers="last")
  student, teacher = Features({0: jnp.float32(s)}, {}), Features({0: jnp.float32(t)}, {})

  @jax.jit
  def run(student, teacher, batch):
    adapters = loss.init(jax.random.key(0), ((0, 0),), shape, E)
    assert adapters["project"].shape == (1, D, E)
    fitted = loss.fit(adapters, ((0, 0),), student, teacher, batch)
    of = lambda adapters: loss.feature_loss(student, teacher, adapters, batch, ((0, 0),)).value()
    return of(adapters), of(fitted)

  start, end = run(student, teacher, batch_of(mask))
  assert start > 0.5
  assert end < 1e-6  # the error due to the ridge


def test_orthogonal_projection_keeps_lengths():
  shape = dataclasses.replace(llama.TINY, hidden_size=D, num_hidden_layers=2)
  loss = hidden.Loss(projection="orthogonal")
  init = lambda key: loss.init(key, ((0, 0), (1, 1)), shape, E)["project"][...]
  project = np.asarray(jax.jit(init)(jax.random.key(0)))
  for p in project:
    np.testing.assert_allclose(p @ p.T, np.eye(D), atol=1e-6)
  assert not np.allclose(project[0], project[1])


# ------------------------------------------------------------------ relations


def test_relations_loss_matches_its_formula(mask):
  """Both sides differ in heads, widths and key heads; attention stays within documents."""
  rng, R = np.random.default_rng(0), 2
  segments = np.array([[1] * 4 + [2] * 5, [1] * 9], np.int32)
  make = lambda heads, h: rng.normal(size=(B, T, heads, h))
  s = (make(4, 3), make(2, 3), make(2, 3))
  t = (make(2, 7), make(2, 7), make(2, 7))
  sees = (segments[:, :, None] == segments[:, None, :]) & np.tril(np.ones((T, T), bool))

  def relation(x):
    x = x.reshape(B, T, R, -1).transpose(0, 2, 1, 3)
    z = np.where(sees[:, None], x @ x.transpose(0, 1, 3, 2) / np.sqrt(x.shape[-1]), -np.inf)
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)

  per = []
  for a, b in zip(s, t, strict=True):
    p, q = relation(b), relation(a)
    ratio = np.where(sees[:, None], p / np.where(sees[:, None], q, 1), 1)
    per.append((p * np.log(np.where(ratio > 0, ratio, 1))).sum(-1).mean(1))
  f32 = lambda qkv: tuple(map(np.float32, qkv))
  loss = relations.Loss(heads=R)
  args = ({}, batch_of(mask, segments), ((1, 1),))
  run = jax.jit(lambda s, t: loss.feature_loss(s, t, *args).value())
  got = run(Features({}, {1: f32(s)}), Features({}, {1: f32(t)}))
  np.testing.assert_allclose(got, np.mean(per, 0)[mask].mean(), rtol=2e-6)


def test_relations_loss_does_not_depend_on_the_block_size(mask, monkeypatch):
  make = lambda seed: tuple(np.float32(vectors(seed + i, 8).reshape(B, T, 2, 4)) for i in range(3))
  (q, *rest), teacher, batch = make(1), Features({}, {1: make(7)}), batch_of(mask)
  student = lambda q: Features({}, {1: (q, *rest)})
  total = lambda q: relations.Loss().feature_loss(student(q), teacher, {}, batch, ((1, 1),)).total
  run = lambda: jax.jit(jax.value_and_grad(lambda q: total(q)))(q)  # a new function each time
  whole = run()
  monkeypatch.setattr(relations, "QUERIES", 4)  # does not divide 9
  blocks = run()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), whole, blocks)


# ------------------------------------------------------------------ relational


@pytest.mark.parametrize("positions", [32, 4])  # 4 does not divide 9
def test_relational_loss_matches_its_formula(mask, monkeypatch, positions):
  """Each token is compared with the trained tokens before it in its document."""
  monkeypatch.setattr(relational, "POSITIONS", positions)
  s, t, tokens = vectors(1, D), vectors(2, E), 4
  segments = np.array([[1] * 5 + [2] * 4, [1] * 7 + [0] * 2])
  huber = lambda x: np.where(np.abs(x) <= 1, 0.5 * x * x, np.abs(x) - 0.5)
  want = 0.0
  for b, i in zip(*np.nonzero(mask), strict=True):
    near = range(max(0, i - tokens + 1), i)
    near = [j for j in near if mask[b, j] and segments[b, j] == segments[b, i]]
    if not near:
      continue

    def parts(x, b=b, i=i, near=near):
      e = x[b, i] - x[b, near]
      d = np.linalg.norm(e, axis=-1)
      unit = e / d[:, None]
      return d / d.mean(), (unit @ unit.T)[~np.eye(len(near), dtype=bool)]

    (ds, angle_s), (dt, angle_t) = parts(s), parts(t)
    want += huber(ds - dt).mean() + 2.0 * (huber(angle_s - angle_t).mean() if len(near) > 1 else 0)
  args = ({}, batch_of(mask, segments), ((0, 0),))
  one = lambda x: Features({0: jnp.float32(x)}, {})
  loss = relational.Loss(tokens=tokens)
  got = jax.jit(lambda s, t: loss.feature_loss(s, t, *args))(one(s), one(t))
  np.testing.assert_allclose(got.total, want, rtol=1e-5)
  assert got.count == mask.sum()


def test_tokens_that_differ_only_by_rounding_have_no_direction(mask):
  """The rounding error of x - x in another order of operations has a random direction."""
  s = vectors(1, D).astype(np.float32)
  s[:, 3] = s[:, 1]
  t = s.copy()
  t[:, 3] = np.nextafter(s[:, 1], np.float32(np.inf))
  segments = np.ones(mask.shape, int)
  args = ({}, batch_of(mask, segments), ((0, 0),))
  one = lambda x: Features({0: jnp.asarray(x)}, {})
  loss = lambda x: relational.Loss(tokens=4).feature_loss(one(x), one(t), *args).total
  value, gradient = jax.jit(jax.value_and_grad(loss))(s)
  assert abs(value) < 1e-9
  assert np.abs(gradient).max() < 1e-4


# ------------------------------------------------------------------ maps and needs


def test_layer_pairs():
  assert features.pairs("uniform", 3, 12) == ((0, 3), (1, 7), (2, 11))
  assert features.pairs("uniform", 4, 2) == ((0, 0), (1, 0), (2, 0), (3, 1))
  assert features.pairs("last", 3, 12) == ((2, 11),)
  assert features.pairs("0:4 2:11", 3, 12) == ((0, 4), (2, 11))
  for bad in ("0:12", "3:0", "zero:1", ""):
    with pytest.raises(InputError, match="layers is .*; expected"):
      features.pairs(bad, 3, 12)


@pytest.mark.parametrize(
  "make, message",
  [
    (
      lambda c: hidden.Loss(projection="orthogonal").init(KEY, ((0, 1),), c, 32),
      "expected 'none' for .* 32",
    ),
    (
      lambda c: hidden.Loss().init(jax.random.key(0), ((0, 1),), c, 48),
      "Set it to 'orthogonal' or",
    ),
    (
      lambda c: relations.Loss(heads=5).feature_specs(((1, 1),), c, c),
      "heads is 5; expected a divisor of 32",
    ),
    (  # 4 heads, of which keys have 12 numbers and values 10
      lambda c: relations.Loss(heads=12).feature_specs(((1, 1),), *2 * (deepseek_v3.TINY,)),
      "heads is 12; expected a divisor of 40, the width of the student's values",
    ),
    (lambda c: relations.Loss().feature_specs(((0, 1),), c, c), "cannot compare layer 0"),
    (lambda c: hidden.Loss(distance="l1"), "distance is 'l1'"),
    (lambda c: relational.Loss(tokens=2), "tokens is 2; expected at least 3"),
  ],
)
def test_what_does_not_fit_is_refused(make, message):
  with pytest.raises(InputError, match=message):
    make(llama.TINY)


def test_recomputed_queries_keys_and_values_are_those_of_the_model():
  """The output of a layer follows from the queries, keys and values recomputed from a tap."""
  model = jax.jit(lambda key: llama.Model(llama.TINY, key))(jax.random.key(0))
  tokens = np.random.default_rng(1).integers(0, 256, (1, T))
  inputs = Inputs(tokens, jnp.arange(T)[None], jnp.ones((1, T), jnp.int32))
  needs, compute = FeatureSpec(hidden=(0,), qkv=(1,)), ComputeConfig()
  extract = lambda m, i: needs.extract(m, m(i, compute, needs.taps), i, compute)
  got = jax.jit(extract)(model, inputs)
  real = llama.Block.qkv

  def all_seen(model, inputs):
    seen = []
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(llama.Block, "qkv", lambda *args: seen.append(real(*args)) or seen[-1])
      patch.setattr(jax.lax, "scan", lambda f, c, xs: unrolled(f, c, xs))
      model(inputs, compute)
    return seen

  for a, b in zip(got.qkv[1], jax.jit(all_seen)(model, inputs)[1], strict=True):
    np.testing.assert_allclose(a, b, atol=5e-6)  # one of them is computed in a fused program


def unrolled(f, carry, xs):
  for i in range(len(jax.tree.leaves(xs)[0])):
    carry, _ = f(carry, jax.tree.map(lambda x, i=i: x[i], xs))
  return carry, None
