"""Tests of feature losses of encoders: bidirectional, with a mean over positions per label."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.losses import hidden, relational, relations
from distill_jax.losses.features import Features
from distill_jax.types import Batch

B, S, D, H = 3, 7, 8, 2
SEEN = np.arange(S)[None] < np.array([[7], [4], [5]])
LABELLED = np.array([[True], [True], [False]])


def features(seed):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(B, S, D))
  x[~SEEN] = np.nan  # padding may hold anything
  heads = [np.where(SEEN[..., None, None], rng.normal(size=(B, S, H, D // H)), np.nan)] * 3
  qkv = tuple(jnp.asarray(h, jnp.float32) for h in heads)
  return x, heads[0], Features({0: jnp.asarray(x, jnp.float32)}, {1: qkv})


def batch():
  zeros = jnp.zeros((B, 1), jnp.int32)
  return Batch(None, zeros, jnp.asarray(LABELLED), valid_BS=jnp.asarray(SEEN))


def test_hidden_loss_of_an_encoder_is_a_mean_over_its_input_positions():
  (s, _, mine), (t, _, theirs) = features(0), features(1)
  got = hidden.Loss(layers="0:0").feature_loss(mine, theirs, {}, batch(), ((0, 0),))
  of = [
    np.mean(
      [np.sum((s[b, i] - t[b, i]) ** 2) / np.sum(t[b, i] ** 2) for i in np.flatnonzero(SEEN[b])]
    )
    for b in range(2)  # the third has no label
  ]
  assert float(got.count) == 2
  assert float(got.total) == pytest.approx(np.sum(of), rel=1e-6)


def test_relations_of_an_encoder_are_bidirectional():
  (_, s, mine), (_, t, theirs) = features(0), features(1)
  got = relations.Loss(layers="1:1", heads=H).feature_loss(mine, theirs, {}, batch(), ((1, 1),))

  def relation(x_NHh, h):  # relations among the valid positions of one example, float64
    z = x_NHh[:, h] @ x_NHh[:, h].T / np.sqrt(D // H)
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)

  total = 0.0
  for b in range(2):
    kl = []
    for h in range(H):
      p, q = (relation(x[b][SEEN[b]], h) for x in (t, s))
      kl.append(np.mean(np.sum(p * np.log(p / q), -1)))
    total += np.mean(kl)
  assert float(got.total) == pytest.approx(total, rel=2e-6)


@pytest.mark.parametrize("loss", [hidden.Loss(layers="0:0"), relational.Loss(layers="0:0")])
def test_padding_has_no_gradient(loss):
  (_, _, mine), (_, _, theirs) = features(0), features(1)

  def total(x_BSD):
    return loss.feature_loss(mine.replace(hidden={0: x_BSD}), theirs, {}, batch(), ((0, 0),)).total

  grad = np.asarray(jax.jit(jax.grad(total))(mine.hidden[0]))
  assert np.all(grad[~SEEN] == 0) and np.all(grad[2] == 0)
  assert np.all(np.any(grad[:2][SEEN[:2]] != 0, -1))
