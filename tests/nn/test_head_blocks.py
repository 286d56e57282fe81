"""The fused head in parts that fit in cache, against torch in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from distill_jax import losses
from distill_jax.losses import DenseTargets
from distill_jax.nn import head_blocks
from distill_jax.types import Batch

B, T, D, TEACHER_D, V, TEMPERATURE = 2, 9, 6, 5, 36, 2.0


def test_an_online_step_in_parts(monkeypatch):
  """Three positions at a time, of chunks of 2 * 3 positions, and blocks of 4 rows."""
  monkeypatch.setattr(head_blocks, "LOGITS_BYTES", 3 * V * 4)
  monkeypatch.setattr(head_blocks, "BLOCK_BYTES", 4 * D * 4)
  rng = np.random.default_rng(0)
  hidden, head = rng.normal(size=(B, T, D)), rng.normal(size=(V, D))
  of_teacher, teacher_head = rng.normal(size=(B, T, TEACHER_D)), rng.normal(size=(V, TEACHER_D))
  labels, mask = rng.integers(0, V - 2, (B, T)), rng.random((B, T)) < 0.7
  f32 = lambda x: jnp.asarray(x, jnp.float32)
  targets = DenseTargets(hidden_BTD=f32(of_teacher), head_VD=f32(teacher_head))
  batch = Batch(None, jnp.asarray(labels), jnp.asarray(mask), {"teacher": targets})
  mix = {
    "soft": losses.KD(weight=0.6, temperature=TEMPERATURE),
    "reverse": losses.KD(weight=0.3, divergence="reverse_kl"),
    "hard": losses.CE(weight=0.1),
  }

  def fused(hidden, head):
    return losses.fused_loss(mix, hidden, head, batch, chunk=3, vocab_size=V - 2)[0]

  compiled = jax.jit(jax.value_and_grad(fused, argnums=(0, 1)))
  loss, grads = compiled(f32(hidden), f32(head))

  hidden, head = (torch.tensor(x, requires_grad=True) for x in (hidden, head))
  z = (hidden @ head.T)[torch.tensor(mask)][:, : V - 2]
  t = torch.tensor((of_teacher @ teacher_head.T)[mask][:, : V - 2])
  log = lambda x, T=1.0: (x / T).log_softmax(-1)
  kl = lambda a, b: (a.exp() * (a - b)).sum(-1).mean()
  want = 0.6 * TEMPERATURE**2 * kl(log(t, TEMPERATURE), log(z, TEMPERATURE))
  want += 0.3 * kl(log(z), log(t))
  want += 0.1 * torch.nn.functional.cross_entropy(z, torch.tensor(labels[mask]))
  # float32 sums over 36 outcomes and 6 features: a few units in the last place.
  np.testing.assert_allclose(loss, want.item(), rtol=3e-6)
  for got, truth in zip(grads, torch.autograd.grad(want, (hidden, head)), strict=True):
    np.testing.assert_allclose(got, truth, atol=1e-6 * truth.abs().max().item())
