"""The fused head against a dense float64 reference: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.losses import SampledTargets, ce, kd
from distill_jax.nn import fused_head
from distill_jax.schedules import constant
from distill_jax.types import Batch, Inputs, Mean

B, T, D, V, K = 3, 11, 8, 37, 6
HARD, SOFT, TEMPERATURE = 0.3, 0.7, 2.0


def problem(seed=0):
  rng = np.random.default_rng(seed)
  hidden, rows = rng.normal(size=(B, T, D)), rng.normal(size=(V, D))
  ids = np.sort(np.argsort(rng.random((B, T, V)), -1)[..., :K], -1)
  weight = rng.dirichlet(np.ones(K), (B, T))
  labels, mask = rng.integers(0, V, (B, T)), rng.random((B, T)) < 0.7
  mask[1] = False  # a row that is all padding
  return hidden, rows, ids, weight, labels, mask


def reference(hidden, rows, ids, weight, labels, mask, T_):
  """Closed forms in float64: d(logits) = scale * (T^2 (q_T - p) / T * soft + (q - y) * hard)."""
  softmax = lambda z: (
    np.exp(z - z.max(-1, keepdims=True))
    / np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)
  )
  z = hidden @ rows.T
  q, qT = softmax(z), softmax(z / T_)
  p, y = np.zeros_like(z), np.zeros_like(z)
  np.put_along_axis(p, ids, weight, -1)
  np.put_along_axis(y, labels[..., None], 1.0, -1)
  h = -(weight * np.log(weight)).sum(-1)
  kl = T_**2 * (-h - (p * np.log(qT)).sum(-1))
  hard = -(y * np.log(q)).sum(-1)
  n = mask.sum()
  total = ((SOFT * kl + HARD * hard) * mask).sum() / n
  dz = (SOFT * T_ * (qT - p) + HARD * (q - y)) * mask[..., None] / n
  return total, dz @ rows, np.einsum("btv,btd->vd", dz, hidden), kl, hard


def fused(hidden, rows, ids, weight, labels, mask, chunk, T_, dtype=jnp.float32, argnums=(0, 1)):
  f32 = lambda x: jnp.asarray(x, jnp.float32)
  entropy = f32(-(weight * np.log(weight)).sum(-1))
  targets = SampledTargets(ids_BTK=jnp.asarray(ids), weight_BTK=f32(weight), entropy_BT=entropy)
  zeros = jnp.zeros((B, T), jnp.int32)
  batch = Batch(
    Inputs(zeros, zeros, zeros), jnp.asarray(labels), jnp.asarray(mask), {"teacher": targets}
  )
  soft, hard = kd.Loss(temperature=constant(T_)), ce.Loss()
  count = jnp.sum(batch.mask_BT)

  def fn(z, piece):
    means = {
      "soft": Mean.of(soft.token_loss(z, piece, 0), piece.mask_BT),
      "hard": Mean.of(hard.token_loss(z, piece, 0), piece.mask_BT),
    }
    return (SOFT * means["soft"].total + HARD * means["hard"].total) / count, means

  loss = lambda h, w: fused_head.loss(fn, h, w, batch, chunk)
  grad = jax.jit(jax.value_and_grad(loss, argnums=argnums, has_aux=True))
  return grad(jnp.asarray(hidden, dtype), jnp.asarray(rows, dtype))


@pytest.mark.parametrize("chunk", [1, 3, 4, 11, 64])  # 3, 4: do not divide 11
@pytest.mark.parametrize("T_", [1.0, TEMPERATURE])
def test_values_and_gradients_in_float32(chunk, T_):
  args = problem()
  want, dh, dw, kl, hard = reference(*args, T_)
  (total, means), (gh, gw) = fused(*args, chunk, T_)
  mask = args[-1]
  # float32 sums over 37 outcomes and 8 features: a few units in the last place.
  np.testing.assert_allclose(total, want, rtol=2e-6)
  np.testing.assert_allclose(means["soft"].value(), kl[mask].mean(), rtol=2e-6)
  np.testing.assert_allclose(means["hard"].value(), hard[mask].mean(), rtol=2e-6)
  np.testing.assert_allclose(gh, dh, atol=5e-7 * np.abs(dh).max())
  np.testing.assert_allclose(gw, dw, atol=5e-7 * np.abs(dw).max())


@pytest.mark.smoke
def test_bfloat16_inputs_keep_float32_reductions():
  """The reference uses the same rounded inputs, so only d(logits) is rounded differently."""
  hidden, rows, *rest = problem()
  round_ = lambda x: np.float64(jnp.asarray(x, jnp.bfloat16))
  want, dh, dw, *_ = reference(round_(hidden), round_(rows), *rest, TEMPERATURE)
  (total, _), (gh, gw) = fused(hidden, rows, *rest, 4, TEMPERATURE, jnp.bfloat16)
  np.testing.assert_allclose(total, want, rtol=2e-6)  # logits are float32 sums of exact products
  for got, truth in ((gh, dh), (gw, dw)):
    assert got.dtype == jnp.bfloat16
    error = np.linalg.norm(np.float64(got) - truth) / np.linalg.norm(truth)
    assert error < 2**-8  # half a unit of bfloat16's 8 bits, twice


def test_a_frozen_head_has_no_gradient():
  """Neither its product nor its sum is in the program; the hidden states' gradient is the same."""
  args = problem()
  want, dh, *_ = reference(*args, TEMPERATURE)
  (total, _), gh = fused(*args, 4, TEMPERATURE, argnums=0)
  np.testing.assert_allclose(total, want, rtol=2e-6)
  np.testing.assert_allclose(gh, dh, atol=5e-7 * np.abs(dh).max())
  for argnums, sums in ((0, False), ((0, 1), True)):
    traced = jax.make_jaxpr(
      lambda h, w, argnums=argnums: fused(h, w, *args[2:], 4, 1.0, jnp.bfloat16, argnums)
    )(*args[:2])
    assert (f"f32[{V},{D}]" in str(traced.jaxpr.eqns)) == sums


def test_nan_in_masked_positions_has_no_effect():
  hidden, rows, ids, weight, labels, mask = problem()
  clean = fused(hidden, rows, ids, weight, labels, mask, 4, 1.0)
  bad = np.where(mask[..., None], hidden, np.nan)
  weight = np.where(mask[..., None], weight, np.nan)
  poisoned = fused(bad, rows, ids, weight, labels, mask, 4, 1.0)
  jax.tree.map(np.testing.assert_array_equal, clean, poisoned)


def test_metrics_have_no_gradient_and_equal_fold():
  args = problem()
  (_, means), _ = fused(*args, 4, 1.0)
  (_, whole), _ = fused(*args, 64, 1.0)
  for name in means:
    np.testing.assert_allclose(means[name].total, whole[name].total, rtol=2e-6)
    assert means[name].count == args[-1].sum()


def test_logits_exist_for_one_chunk_only():
  """The compiled program has no array with more positions times vocabulary than a chunk."""
  big = 4096
  hidden, rows = jnp.zeros((1, 64, D)), jnp.zeros((big, D))
  zeros = jnp.zeros((1, 64), jnp.int32)
  batch = Batch(Inputs(zeros, zeros, zeros), zeros, jnp.ones((1, 64), bool))
  fn = lambda z, piece: (jnp.sum(ce.Loss().token_loss(z, piece, 0)), {})
  grad = jax.jit(jax.grad(lambda h: fused_head.loss(fn, h, rows, batch, 8)[0]))
  temporaries = grad.lower(hidden).compile().memory_analysis().temp_size_in_bytes
  assert temporaries < 64 * big * 4  # one [T, V] array in float32
