"""The losses of realised tokens: their expected gradient, clipping, rewards, and refusals."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import steps
import tiny_store

from distill_jax import config, losses
from distill_jax.errors import InputError
from distill_jax.losses import DenseTargets, LabelTargets, SampledTargets, SpanTargets, TopKTargets
from distill_jax.models import llama
from distill_jax.training import heldout, validate
from distill_jax.training import stores as stores_lib
from distill_jax.types import Batch, Rollout

B, T, D, V, K = 2, 5, 6, 9, 3
f32 = lambda x: jnp.asarray(x, jnp.float32)


def log_softmax(z):
  z = np.float64(z)
  return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def outcomes():
  """One position of each of B rows, with every token in turn as its label: [B, V] labels.

  The third array has the probabilities of a student that sampled the texts earlier.
  """
  rng = np.random.default_rng(0)
  return tuple(np.float32(rng.normal(size=(B, 1, V))) * 1.5 for _ in range(3))


def targets_of(kind, teacher_B1V, labels_BV):
  """Returns targets of a kind for the same teacher."""
  logp_BV = log_softmax(teacher_B1V)[:, 0]
  given = {"label_logp_BT": f32(np.take_along_axis(logp_BV, labels_BV, 1))}
  ids_BVK = jnp.broadcast_to(jnp.arange(K, dtype=jnp.int32), (B, V, K))
  if kind == "dense":
    hidden_BVD = f32(np.broadcast_to(teacher_B1V, (B, V, V)))
    return DenseTargets(hidden_BTD=hidden_BVD, head_VD=jnp.eye(V))
  if kind == "sampled":
    return SampledTargets(ids_BTK=ids_BVK, weight_BTK=jnp.full((B, V, K), 1 / K), **given)
  if kind == "topk":
    logp_BVK = f32(np.broadcast_to(logp_BV[:, None, :K], (B, V, K)))
    return TopKTargets(ids_BTK=ids_BVK, logp_BTK=logp_BVK, **given)
  return LabelTargets(**given)


def expected_gradient(fn, kind, student_B1V, teacher_B1V, behaviour_B1V, reward_V=None):
  """Returns sum_y b(y) grad loss(y) for the logits of the student, and sum_y b(y) loss(y)."""
  labels_BV = np.broadcast_to(np.arange(V), (B, V))
  logb_BV = log_softmax(behaviour_B1V)[:, 0]
  reward_BV = None if reward_V is None else f32(np.broadcast_to(reward_V, (B, V)))
  batch = Batch(
    None,
    jnp.asarray(labels_BV),
    jnp.ones((B, V), bool),
    {"teacher": targets_of(kind, teacher_B1V, labels_BV)},
    rollout=Rollout(f32(logb_BV), reward_BV),
  )
  whole = lambda z: fn.token_loss(jnp.broadcast_to(z, (B, V, V)), batch, 0)
  value_BV, pull = jax.vjp(whole, f32(student_B1V))
  b_BV = np.exp(logb_BV)
  return pull(f32(b_BV))[0][:, 0], (b_BV * np.float64(value_BV)).sum(-1)


def reverse_kl(student_B1V, teacher_B1V):
  """Returns (KL(q || p), its gradient) in float64, in closed form."""
  logq, logp = (log_softmax(z)[:, 0] for z in (student_B1V, teacher_B1V))
  kl_B1 = (np.exp(logq) * (logq - logp)).sum(-1, keepdims=True)
  return kl_B1[:, 0], np.exp(logq) * (logq - logp - kl_B1)


# float32 logits of size 5 have an error of 5e-7; the sum is over 9 tokens.
CLOSE = {"rtol": 0, "atol": 2e-6}


@pytest.mark.parametrize("kind", ["dense", "sampled", "topk", "labels"])
def test_the_expected_gradient_over_all_tokens_is_that_of_the_reverse_kl(outcomes, kind):
  """The tokens are the student's own or, for policy_gradient, also those of an older student."""
  student, teacher, older = outcomes
  kl, want = reverse_kl(student, teacher)
  unlimited = losses.PolicyGradient(clip=np.inf)
  for fn, behaviour in (
    (unlimited, student),
    (losses.PolicyGradient(), student),  # no ratio is beyond the limit of 0.2
    (unlimited, older),
    (losses.LogRatio(), student),
  ):
    got, value = expected_gradient(fn, kind, student, teacher, behaviour)
    np.testing.assert_allclose(got, want, **CLOSE)
    if isinstance(fn, losses.PolicyGradient):
      np.testing.assert_allclose(value, kl, **CLOSE)
  stale, _ = expected_gradient(losses.LogRatio(), kind, student, teacher, older)
  assert np.abs(stale - want).max() > 0.01  # the comparison can fail


def test_the_gradient_is_that_of_kd_with_the_reverse_kl(outcomes):
  student, teacher, _ = outcomes
  batch = Batch(None, jnp.zeros((B, 1), int), jnp.ones((B, 1), bool))
  dense = DenseTargets(hidden_BTD=f32(teacher), head_VD=jnp.eye(V))
  batch = batch.replace(targets={"teacher": dense})
  kd = lambda z: losses.KD(divergence="reverse_kl").token_loss(z, batch, 0).sum()
  exact = jax.grad(kd)(f32(student))[:, 0]
  got, _ = expected_gradient(losses.PolicyGradient(), "labels", student, teacher, student)
  np.testing.assert_allclose(got, exact, **CLOSE)


def test_a_reward_adds_its_own_policy_gradient_whatever_the_baseline(outcomes):
  student, teacher, older = outcomes
  reward = np.random.default_rng(1).random(V)
  q = np.exp(log_softmax(student)[:, 0])
  mean_B1 = (q * reward).sum(-1, keepdims=True)
  want = reverse_kl(student, teacher)[1] - 2.0 * q * (reward - mean_B1)
  for baseline in (0.0, 0.4):
    fn = losses.PolicyGradient(clip=np.inf, reward_weight=2.0, baseline=baseline)
    got, _ = expected_gradient(fn, "labels", student, teacher, older, reward)
    np.testing.assert_allclose(got, want, **CLOSE)


def problem():
  """A batch in which every case of clipping occurs: both signs, and ratios on both sides."""
  rng = np.random.default_rng(0)
  hidden, head = rng.normal(size=(B, T, D)), rng.normal(size=(V, D))
  labels = rng.integers(0, V, (B, T))
  logq = np.take_along_axis(log_softmax(hidden @ head.T), labels[..., None], -1)[..., 0]
  shift = np.resize([0.5, -0.5, 0.1, -0.1], (B, T))  # log q - log b
  logp = logq + np.repeat([1.5, -1.5, 0.7, -0.7, 0.4], B).reshape(T, B).T
  mask = np.ones((B, T), bool)
  mask[1, -1] = False
  targets = LabelTargets(label_logp_BT=f32(logp))
  rollout = Rollout(f32(logq - shift), f32(np.tile([[1.0], [0.0]], T)))
  labels, mask = jnp.asarray(labels), jnp.asarray(mask)
  return hidden, head, Batch(None, labels, mask, {"teacher": targets}, rollout=rollout)


def reference(fn, hidden, head, batch, fixed):
  """The loss in float64, as one formula per position; the advantage is that of `fixed`."""
  logq_of = lambda h, w: np.take_along_axis(
    log_softmax(h @ w.T), np.array(batch.labels_BT)[..., None], -1
  )[..., 0]
  logq, logp = logq_of(hidden, head), np.float64(batch.targets["teacher"].label_logp_BT)
  if isinstance(fn, losses.LogRatio):
    loss = (logp - logq) ** 2 / 2
  else:
    reward = np.float64(batch.rollout.reward_BT)
    advantage = logp - logq_of(*fixed) + fn.reward_weight * (reward - fn.baseline)
    ratio = np.exp(logq - np.float64(batch.rollout.behaviour_logp_BT))
    clipped = np.clip(ratio, 1 - fn.clip, 1 + fn.clip)
    loss = -np.minimum(ratio * advantage, clipped * advantage)  # as PPO is written
  mask = np.array(batch.mask_BT)
  return loss[mask].sum() / mask.sum()


@pytest.mark.parametrize(
  "fn",
  [losses.PolicyGradient(reward_weight=0.3, baseline=0.5), losses.LogRatio()],
  ids=["policy_gradient", "log_ratio"],
)
def test_value_and_gradient_are_those_of_the_formula(fn):
  """Gradients are compared with central differences of a float64 reference, to float32 rounding."""
  hidden, head, batch = problem()
  run = lambda h, w: losses.fused_loss({"it": fn}, h, w, batch, chunk=2)[0]
  value, grads = jax.jit(jax.value_and_grad(run, argnums=(0, 1)))(f32(hidden), f32(head))
  want = reference(fn, hidden, head, batch, (hidden, head))
  np.testing.assert_allclose(value, want, rtol=0, atol=1e-6)
  for i in range(2):
    rng = np.random.default_rng(i)
    for _ in range(3):
      along = rng.normal(size=(hidden, head)[i].shape)
      moved = []
      for step in (1e-5, -1e-5):
        at = [hidden, head]
        at[i] = at[i] + step * along
        moved.append(reference(fn, *at, batch, (hidden, head)))
      want = (moved[0] - moved[1]) / 2e-5
      np.testing.assert_allclose(np.sum(np.float64(grads[i]) * along), want, rtol=2e-5, atol=1e-6)


def test_positions_beyond_the_limit_have_no_gradient():
  logits = f32(np.zeros((1, 4, V)))
  logq = -np.log(V)
  # Ratios 2 and 1/2, each with a positive and a negative advantage.
  logb = f32(logq - np.log([[2, 2, 0.5, 0.5]]))
  targets = LabelTargets(label_logp_BT=f32(logq + np.array([[1, -1, 1, -1]])))
  labels, mask = jnp.zeros((1, 4), int), jnp.ones((1, 4), bool)
  batch = Batch(None, labels, mask, {"teacher": targets}, rollout=Rollout(logb))
  value, pull = jax.vjp(lambda z: losses.PolicyGradient().token_loss(z, batch, 0), logits)
  moved = np.abs(pull(jnp.ones((1, 4)))[0]).max(-1) > 0
  np.testing.assert_array_equal(moved, [[False, True, True, False]])
  np.testing.assert_allclose(value, [[-1.2, 2, -0.5, 0.8]], rtol=1e-6)


def test_a_student_that_is_its_own_teacher_has_no_loss_and_no_gradient():
  hidden, head, batch = problem()
  hidden, head = f32(hidden), f32(head)
  own = DenseTargets(hidden_BTD=hidden, head_VD=head)
  batch = batch.replace(targets={"teacher": own})
  divergences = ("reverse_kl", "jensen_shannon")
  all_of = {name: losses.KD(divergence=name) for name in divergences} | {
    "policy_gradient": losses.PolicyGradient(),
    "log_ratio": losses.LogRatio(),
  }
  run = lambda h, w: losses.fused_loss(all_of, h, w, batch, chunk=2)
  (_, means), grads = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))(hidden, head)
  for mean in means.values():
    assert abs(float(mean.value())) < 1e-6  # the rounding of a log-probability
  assert all(np.abs(g).max() < 1e-6 for g in grads)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"clip": 0}, "clip is 0; expected a number above 0"),
    ({"clip": np.nan}, "clip is nan; expected a number above 0"),
    ({"reward_weight": np.inf}, "reward_weight is inf; expected a finite number"),
    ({"baseline": 0.5}, "baseline is 0.5; expected 0 without reward_weight"),
  ],
)
def test_options_that_are_not_valid(fields, message):
  with pytest.raises(InputError, match=message):
    losses.PolicyGradient(**fields)


def test_batches_without_what_a_loss_needs_are_refused():
  hidden, head, batch = problem()
  fused = lambda fn, batch: losses.fused_loss({"it": fn}, f32(hidden), f32(head), batch)
  without = batch.replace(rollout=None)
  with pytest.raises(InputError, match="rollout.behaviour_logp_BT is None; expected the behav"):
    fused(losses.PolicyGradient(), without)
  no_reward = batch.replace(rollout=batch.rollout.replace(reward_BT=None))
  with pytest.raises(InputError, match="rollout.reward_BT is None; expected the reward of texts"):
    fused(losses.PolicyGradient(reward_weight=1), no_reward)
  logp_BT = batch.targets["teacher"].label_logp_BT
  of_spans = SpanTargets(span_logp_BT=logp_BT, span_left_BT=jnp.ones((B, T), jnp.int32))
  at_2 = LabelTargets(label_logp_BT=logp_BT, temperature=2.0)
  for fn in (losses.PolicyGradient(), losses.LogRatio()):
    with pytest.raises(InputError, match="needs targets in the student's tokens"):
      fused(fn, batch.replace(targets={"teacher": of_spans}))
    with pytest.raises(InputError, match=r"records.temperature is 2.0; expected 1"):
      fused(fn, batch.replace(targets={"teacher": at_2}))
  for divergence in ("forward_kl", "reverse_kl"):
    with pytest.raises(InputError, match=f"{divergence} compares distributions, but records of"):
      fused(losses.KD(divergence=divergence), batch)
  with pytest.raises(InputError, match="lack the most probable token"):
    fused(losses.PseudoLabel(), batch)


def stores(*changes):
  """Stores without files, of which the checks read only the manifest."""
  manifests = [tiny_store.manifest(**change) for change in changes]
  return [SimpleNamespace(manifest=m, others={}) for m in manifests]


def of_rollouts(*scalars, **change):
  about = {"round": 0, "student": "s", "sampling": {}, "scalars": list(scalars)}
  return {"rollout": about, "format_version": 3} | change


def run_of(fn, count=1):
  c = config.Config(losses={"it": fn})
  return dataclasses.replace(c, train=dataclasses.replace(c.train, records=("a", "b")[:count]))


LABELS = {"kind": "labels", "n": 0}


@pytest.mark.parametrize(
  "fn, changes, message",
  [
    (losses.PolicyGradient(), [{}], "losses.it needs the behaviour_logp of texts that the student"),
    (
      losses.PolicyGradient(reward_weight=1),
      [of_rollouts("behaviour_logp")],
      "needs the reward of texts that .* the records a lack. Set on_policy.reward",
    ),
    (losses.LogRatio(), [{"temperature": 2.0}], "records.temperature is 2.0; expected 1"),
    (losses.LogRatio(), [of_rollouts("behaviour_logp", kind="text", n=0)], "only hold text"),
    (losses.KD(), [LABELS | {"format_version": 3}], "forward_kl compares distributions"),
    (losses.KD(divergence="reverse_kl"), [of_rollouts("behaviour_logp")], "needs exact probab"),
    (losses.PseudoLabel(), [LABELS | {"format_version": 3}], "lack the most probable token"),
  ],
)
def test_records_that_a_loss_cannot_use_are_refused_before_anything_is_read(fn, changes, message):
  c = run_of(fn, len(changes))
  with pytest.raises(InputError, match=message):
    validate.check_records(c, stores(*changes))
    validate.check_rollouts(c, stores(*changes))


def test_rollouts_and_labels_are_accepted():
  for fn in (losses.PolicyGradient(reward_weight=1), losses.LogRatio()):
    for kind in ({}, LABELS, {"kind": "topk", "missing_mass": "tail_bucket"}):
      found = stores(of_rollouts("behaviour_logp", "reward", **kind))
      validate.check_records(run_of(fn), found)
      validate.check_rollouts(run_of(fn), found)


def test_evaluation_on_other_texts_omits_the_loss_that_needs_rollouts():
  """Traced only. Its metrics and other losses stay; the sum of all losses is not that of some."""
  mix = {"on_policy": losses.PolicyGradient(), "hard": losses.CE()}
  step, batch = steps.make_step(losses=mix), steps.make_batch()
  teacher = LabelTargets(label_logp_BT=jnp.zeros(batch.mask_BT.shape))
  batch = batch.replace(targets={"teacher": teacher})
  model = jax.eval_shape(lambda key: llama.Model(llama.TINY, key), jax.random.key(0))
  evaluate = lambda model, batch: heldout.evaluate(step, 0, (model, {}), batch, {})
  found = jax.eval_shape(evaluate, model, batch).keys()
  written = batch.replace(rollout=Rollout(teacher.label_logp_BT))
  whole = jax.eval_shape(evaluate, model, written).keys()
  assert whole - found == {"loss", "on_policy"} and {"hard", "teacher_ce/teacher"} <= found


@pytest.mark.parametrize(
  "changes, what",
  [
    ([{}, of_rollouts("behaviour_logp")], "scalars of texts"),
    ([of_rollouts("behaviour_logp"), of_rollouts("behaviour_logp", "reward")], "scalars of texts"),
    ([{}, LABELS | {"format_version": 3}], "records of kind 'labels'"),
    ([{"kind": "text", "n": 0}, LABELS | {"format_version": 3}], "records of kind 'labels'"),
  ],
)
def test_stores_are_not_mixed_where_missing_numbers_would_be_zeros(changes, what):
  with pytest.raises(
    InputError, match=f"stores in train.records hold {what}.*expected all or none"
  ):
    stores_lib.check_mixture("train.records", [s.manifest for s in stores(*changes)])
  for alike in (changes[:1] * 2, changes[1:] * 2, [{}, {"kind": "text", "n": 0}]):
    stores_lib.check_mixture("train.records", [s.manifest for s in stores(*alike)])
