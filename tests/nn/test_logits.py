"""KL divergence, entropy and label logits against torch in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from distill_jax.nn import fused_head

B, C, V = 2, 3, 41


def kl_in_float64(t, s, T):
  """Returns KL(p || q) and its gradient in the student's logits, from torch."""
  t, s = torch.tensor(np.float64(t)), torch.tensor(np.float64(s), requires_grad=True)
  logp, logq = (t / T).log_softmax(-1), (s / T).log_softmax(-1)
  kl = torch.where(t > -torch.inf, logp.exp() * (logp - logq), 0).nan_to_num().sum(-1)
  (grad,) = torch.autograd.grad(kl.sum(), s)
  return kl.detach().numpy(), grad.numpy()


@jax.jit
def kl_and_gradient(t, s, T=1.0):
  t, s = t.astype(jnp.float32), s.astype(jnp.float32)
  value, pull = jax.vjp(lambda s: fused_head.kl(t, s, T), s)
  return value, pull(jnp.ones_like(value))[0]


entropy = jax.jit(fused_head.entropy)


@pytest.mark.parametrize("T", [0.5, 1.0, 3.0])
def test_kl_of_logits(T):
  rng = np.random.default_rng(0)
  t, s = np.float32(rng.normal(size=(2, B, C, V)) * 3)
  s, t = s + 50, np.where(np.arange(V) == 7, -np.inf, t)  # a token that only the student has
  got, grad = kl_and_gradient(t, s, T)
  want, want_grad = kl_in_float64(t, s, T)
  # Logits of size 60 have an error of 2e-6.
  np.testing.assert_allclose(got, want, rtol=3e-6, atol=3e-6)
  np.testing.assert_allclose(grad, want_grad, atol=3e-6)


@pytest.mark.parametrize("noise", [0.0, 1e-3, 1e-2, 0.1])
def test_kl_is_accurate_where_student_and_teacher_are_close(noise):
  """With 50,000 logits of size 30, sums of p (log p - log q) have errors of 2e-6."""
  rng = np.random.default_rng(1)
  t = np.float32(rng.normal(size=(1, 8, 50_000)) * 6)
  s = t + np.float32(noise * rng.normal(size=t.shape))
  got, _ = kl_and_gradient(t, s)
  want, _ = kl_in_float64(t, s, 1.0)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=3e-7)
  assert np.all(got >= 0)
  assert noise or np.all(got == 0)


def test_padding_rows_and_extreme_logits_are_finite():
  z = np.full((B, C, V), -1e4)
  z[..., 3], z[..., -2:] = 1e4, -np.inf
  other = np.roll(z, 1, -1)
  other[..., 0], other[..., -2:] = -1e4, -np.inf
  for values in (kl_and_gradient(other, z), (entropy(jnp.float32(z)),)):
    assert all(np.all(np.isfinite(x)) for x in values)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_broken_logits_do_not_become_numbers(broken):
  good = np.zeros((B, C, V))
  bad = good.copy()
  bad[0, 0, 5] = broken
  for t, s in ((bad, good), (good, bad)):
    value, _ = kl_and_gradient(t, s)
    assert np.isnan(value[0, 0]) and np.all(value[1:] == 0)
  assert np.isnan(entropy(jnp.float32(bad))[0, 0])


def test_entropy_and_label_logits():
  rng = np.random.default_rng(2)
  z, labels = np.float32(rng.normal(size=(B, C, V)) * 3), rng.integers(0, V, (B, C))
  want = torch.distributions.Categorical(logits=torch.tensor(np.float64(z))).entropy()
  np.testing.assert_allclose(entropy(jnp.float32(z)), want, rtol=2e-6)

  @jax.value_and_grad
  def logp(z):
    return jnp.sum(fused_head.label_logp(z, jnp.asarray(labels)))

  value, grad = jax.jit(logp)(jnp.float32(z))
  z = torch.tensor(np.float64(z), requires_grad=True)
  total = z.log_softmax(-1).gather(-1, torch.tensor(labels)[..., None]).sum()
  np.testing.assert_allclose(value, total.item(), rtol=2e-6)
  np.testing.assert_allclose(grad, torch.autograd.grad(total, z)[0], atol=1e-6)
