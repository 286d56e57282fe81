"""fused_loss and logits_loss: weights, masks and the label count, in one place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distill_jax as dj
from distill_jax import losses, registry
from distill_jax.errors import InputError
from distill_jax.losses import DenseTargets, SampledTargets, TopKTargets
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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32])
def test_a_mask_of_numbers_is_refused(dtype):
  """Confidences as a mask divided the whole loss by their sum: a mask of 0.5 doubled it."""
  hidden, head, batch = problem()
  batch = batch.replace(mask_BT=batch.mask_BT.astype(dtype))
  for run in (losses.fused_loss, lambda mix, h, _, b: losses.logits_loss(mix, h @ head.T, b)):
    with pytest.raises(
      InputError, match="Batch.mask_BT has the dtype .* labels as Batch.smoothing_BT"
    ):
      run({"hard": losses.CE()}, hidden, head, batch)


@pytest.mark.parametrize("chunk", [0, -5])
def test_a_chunk_without_positions_is_refused(chunk):
  hidden, head, batch = problem()
  with pytest.raises(InputError, match=f"chunk is {chunk}; expected at least 1 position"):
    losses.fused_loss({"hard": losses.CE()}, hidden, head, batch, chunk=chunk)


@pytest.mark.parametrize("name", registry.names("losses"))
def test_the_fields_of_a_loss_have_to_be_named(name):
  """KD(2.0) would be a weight of 2, not a temperature."""
  with pytest.raises(TypeError, match="positional argument"):
    registry.load("losses", name).Loss(2.0)


def test_a_weight_is_a_number_of_any_type_or_a_schedule():
  assert losses.KD(weight=np.float32(0.5), temperature=np.int64(2)) == losses.KD(
    weight=0.5, temperature=2.0
  )
  with pytest.raises(InputError, match="weight is 'reverse_kl'; expected a number or a Schedule"):
    losses.KD(weight="reverse_kl")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_teacher_may_give_its_logits(dtype):
  """They give the same loss and gradient as the hidden states and the head of the teacher."""
  hidden, head, batch = problem()
  theirs = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, D)), jnp.float32)
  logits = (theirs @ head.T).astype(dtype)
  eye = jnp.eye(V)  # as a head, of hidden states that are the logits
  outputs = DenseTargets(hidden_BTD=logits.astype(jnp.float32), head_VD=eye)
  mix = {"soft": losses.KD(temperature=2.0), "hard": losses.CE(weight=0.3)}

  def fused(targets):
    part = batch.replace(targets={"teacher": targets})
    return jax.value_and_grad(lambda h: losses.fused_loss(mix, h, head, part, chunk=4)[0])(hidden)

  given = DenseTargets(logits_BTV=logits)
  for a, b in zip(fused(given), fused(outputs), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  direct, _ = losses.logits_loss(mix, hidden @ head.T, batch.replace(targets={"teacher": given}))
  np.testing.assert_allclose(direct, fused(outputs)[0], rtol=1e-5)


def test_a_teacher_without_all_its_outputs_is_refused():
  hidden, head, batch = problem()
  for fields, found in (({}, "no outputs"), ({"hidden_BTD": hidden}, "hidden_BTD")):
    batch = batch.replace(targets={"teacher": DenseTargets(**fields)})
    expected = f"DenseTargets has {found}; expected hidden_BTD and head_VD, or logits_BTV"
    with pytest.raises(InputError, match=expected):
      losses.fused_loss({"soft": losses.KD()}, hidden, head, batch)


def test_a_batch_without_inputs_names_what_is_missing():
  _, _, batch = problem()
  with pytest.raises(InputError, match="Batch.inputs is None; expected a model.s inputs"):
    _ = batch.model_inputs
