"""fused_loss and logits_loss: weights, masks and the label count, in one place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distill_jax as dj
from distill_jax import losses
from distill_jax.errors import InputError
from distill_jax.losses import SampledTargets, TopKTargets
from distill_jax.types import Batch, Mean

B, T, D, V, K = 3, 7, 8, 37, 6


def problem(kind="topk"):
  rng = np.random.default_rng(0)
  f32 = lambda x: jnp.asarray(x, jnp.float32)
  hidden, head = f32(rng.normal(size=(B, T, D))), f32(rng.normal(size=(V, D)))
  ids = jnp.asarray(np.argsort(rng.random((B, T, V)), -1)[..., :K])
  p = rng.dirichlet(np.ones(K), (B, T))
  if kind == "topk":
    logp = f32(np.log(p))
    targets = TopKTargets(ids_BTK=ids, logp_BTK=logp, missing_mass="renormalise")
  else:
    entropy = f32(-(p * np.log(p)).sum(-1))
    targets = SampledTargets(ids_BTK=ids, weight_BTK=f32(p), entropy_BT=entropy)
  labels, mask = rng.integers(0, V, (B, T)), rng.random((B, T)) < 0.7
  return hidden, head, Batch(None, jnp.asarray(labels), jnp.asarray(mask), {"teacher": targets})


def test_the_scalar_is_the_weighted_mean_over_labels():
  """Written out: 0.3 CE + 2^2 KL(p^(1/2) || q^(1/2)), each over the labels that are trained on."""
  hidden, head, batch = problem()
  loss, means = dj.fused_loss(
    {"soft": dj.losses.KD(temperature=2.0), "hard": dj.losses.CE(weight=0.3)},
    hidden,
    head,
    batch,
    chunk=4,
  )
  z, mask = np.float64(hidden) @ np.float64(head).T, np.array(batch.mask_BT)
  log_softmax = lambda z: z - np.log(np.exp(z).sum(-1, keepdims=True))
  ce = -np.take_along_axis(log_softmax(z), np.array(batch.labels_BT)[..., None], -1)[..., 0]
  targets = batch.targets["teacher"]
  at = lambda z: np.take_along_axis(z, np.array(targets.ids_BTK), -1)
  logp, logq = log_softmax(np.float64(targets.logp_BTK) / 2), log_softmax(at(z) / 2)
  kl = 4 * (np.exp(logp) * (logp - logq)).sum(-1)
  np.testing.assert_allclose(means["hard"].value(), ce[mask].mean(), rtol=1e-5)
  np.testing.assert_allclose(means["soft"].value(), kl[mask].mean(), rtol=1e-5)
  np.testing.assert_allclose(loss, kl[mask].mean() + 0.3 * ce[mask].mean(), rtol=1e-5)


def test_logits_give_the_same_value_and_gradient():
  hidden, head, batch = problem("sampled")
  mix = {"soft": losses.KD(weight=0.5), "hard": losses.CE(label_smoothing=0.1)}
  fused = lambda h, w: losses.fused_loss(mix, h, w, batch, chunk=4)
  direct = lambda h, w: losses.logits_loss(mix, jnp.einsum("btd,vd->btv", h, w), batch)
  got, want = (
    jax.jit(jax.value_and_grad(fn, argnums=(0, 1), has_aux=True))(hidden, head)
    for fn in (fused, direct)
  )
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_microbatches_add_up_to_the_batch():
  """With the label count of the whole batch, losses and means of its parts add."""
  hidden, head, batch = problem()
  mix = {"soft": losses.KD(), "hard": losses.CE(weight=0.3)}
  fused = jax.jit(lambda *args, **k: losses.fused_loss(mix, *args, chunk=4, **k))
  want, means = fused(hidden, head, batch)
  count = losses.count_labels(batch)
  total, parts = 0.0, {}
  for rows in (slice(0, 1), slice(1, 3)):
    piece = jax.tree.map(lambda x: x[rows], batch)  # noqa: B023
    loss, more = fused(hidden[rows], head, piece, label_count=count)
    total += loss
    parts = {n: parts[n] + m if parts else m for n, m in more.items()}
  np.testing.assert_allclose(total, want, rtol=1e-6)
  for name, mean in means.items():
    np.testing.assert_allclose(parts[name].value(), mean.value(), rtol=1e-6)


def test_schedules_follow_the_step_and_weights_can_be_given():
  hidden, head, batch = problem()
  decay = dj.Schedule(((0, 1.0), (10, 0.0)))
  hard = {"hard": losses.CE(weight=decay)}
  at = lambda step, **k: float(losses.fused_loss(hard, hidden, head, batch, step=step, **k)[0])
  assert at(5) == pytest.approx(0.5 * at(0))
  assert at(10) == 0
  assert at(10, weights={"hard": 2.0}) == pytest.approx(2 * at(0))


def test_further_metrics_are_means_without_gradient():
  hidden, head, batch = problem()
  accuracy = lambda z, piece: {
    "accuracy": Mean.of(jnp.argmax(z, -1) == piece.labels_BT, piece.mask_BT)
  }
  _, means = losses.fused_loss(
    {"hard": losses.CE()}, hidden, head, batch, metrics=accuracy, chunk=2
  )
  right = np.array(jnp.argmax(hidden @ head.T, -1) == batch.labels_BT)[np.array(batch.mask_BT)]
  assert float(means["accuracy"].value()) == pytest.approx(right.mean())


def test_it_is_differentiated_in_a_jitted_loop_of_bfloat16():
  hidden, head, batch = problem("sampled")
  hidden, head = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
  grads = jax.jit(
    jax.grad(lambda h, w: losses.fused_loss({"s": losses.KD()}, h, w, batch)[0], argnums=(0, 1))
  )(hidden, head)
  assert all(g.dtype == jnp.bfloat16 and bool(jnp.isfinite(g).all()) for g in grads)


def test_losses_that_cannot_be_computed_are_refused():
  hidden, head, batch = problem()
  with pytest.raises(InputError, match=r"losses\['soft'\].teacher is 'big'; expected one of"):
    losses.fused_loss({"soft": losses.KD(teacher="big")}, hidden, head, batch)
  with pytest.raises(InputError, match=r"losses\['h'\] is 'hidden'; expected a loss of logits"):
    losses.fused_loss({"h": losses.Hidden()}, hidden, head, batch)
  with pytest.raises(InputError, match="have shape .* Pass "):
    losses.fused_loss({"hard": losses.CE()}, hidden[:, 1:], head, batch)
  with pytest.raises(InputError, match="have shape"):
    losses.logits_loss({"hard": losses.CE()}, hidden[0], batch)
  _, _, counts = problem("sampled")
  with pytest.raises(InputError, match="temperature differs from the recorded one"):
    losses.fused_loss({"soft": losses.KD(temperature=2.0)}, hidden, head, counts)


def test_a_batch_without_inputs_names_what_is_missing():
  _, _, batch = problem()
  with pytest.raises(InputError, match="Batch.inputs is None; expected a model.s inputs"):
    _ = batch.model_inputs
