"""The diagnosis of a round against float64 references that see all logits."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import steps

from distill_jax.errors import InputError
from distill_jax.losses import LabelTargets, SampledTargets, TopKTargets
from distill_jax.models import llama
from distill_jax.nn import sharding
from distill_jax.on_policy import diagnosis
from distill_jax.on_policy.options import OnPolicyOptions
from distill_jax.types import Rollout

TOP = diagnosis.TOP


def log_softmax(model, batch):
  """Returns a model's log-probabilities [B, T, V] in float64."""
  out = model(batch.inputs, steps.make_step().student)
  z = np.float64(out.hidden_BTD) @ np.float64(out.head_VD).T
  z -= z.max(-1, keepdims=True)
  return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def problem():
  """Returns (step, state, teacher, batch, log q, log p), with sharper models than random ones."""
  step = steps.make_step(chunk=5)
  sharp = lambda model: jax.tree.map(lambda x: 3 * x, model)
  student, teacher = (
    sharp(jax.jit(lambda key: llama.Model(llama.TINY, key))(jax.random.key(n))) for n in (0, 1)
  )
  batch = steps.make_batch()
  logq, logp = log_softmax(student, batch), log_softmax(teacher, batch)
  rng = np.random.default_rng(0)
  at = np.array(batch.labels_BT)[..., None]
  own = np.take_along_axis(logq, at, -1)[..., 0] + rng.normal(scale=0.1, size=at.shape[:2])
  rollout = Rollout(behaviour_logp_BT=jnp.asarray(own, jnp.float32))
  state = types.SimpleNamespace(params=student)
  return step, state, teacher, batch.replace(targets={}, rollout=rollout), logq, logp


def diagnose(problem, targets=None):
  """Returns the metrics and texts, with recorded targets or the teacher in the step."""
  step, state, teacher, batch, *_ = problem
  run = jax.jit(
    lambda params, *args: diagnosis.Diagnosis(step)(types.SimpleNamespace(params=params), *args)
  )
  if targets is None:
    return jax.device_get(run(state.params, batch, {"teacher": teacher}))
  return jax.device_get(run(state.params, batch.replace(targets={"teacher": targets}), {}))


@pytest.fixture(scope="module")
def dense(problem):
  return diagnose(problem)


@pytest.fixture(scope="module")
def wanted(problem):
  """Returns the metrics in float64."""
  *_, batch, logq, logp = problem
  mask, labels = np.array(batch.mask_BT), np.array(batch.labels_BT)[..., None]
  top = lambda x: np.argsort(-x, -1, kind="stable")[..., :TOP]
  ours, theirs = top(logq), top(logp)
  at = lambda x, ids: np.take_along_axis(x, ids, -1)
  values = {
    "overlap": (ours[..., None] == theirs[..., None, :]).any(-2).mean(-1),
    "student_mass": np.exp(at(logq, theirs)).sum(-1),
    "teacher_mass": np.exp(at(logp, ours)).sum(-1),
    "reverse_kl": (np.exp(logq) * (logq - logp)).sum(-1),
  }
  ratio = (at(logq, labels) - at(logp, labels))[..., 0]
  drift = np.abs(at(logq, labels)[..., 0] - np.float64(batch.rollout.behaviour_logp_BT))
  return values, ratio, drift[mask].mean(), mask


def test_the_metrics_of_a_teacher_in_the_step_are_exact(dense, wanted):
  values, _, drift, mask = wanted
  for key, x in values.items():
    np.testing.assert_allclose(dense.metrics[f"{key}/teacher"], x[mask].mean(), rtol=2e-5)
  np.testing.assert_allclose(dense.metrics["drift"], drift, rtol=1e-4)  # 0.1 of about 10 nats
  assert 0 < values["overlap"].mean() < 1


def test_the_tenths_are_of_each_text(dense, wanted):
  values, _, _, mask = wanted
  sums, counts = np.zeros(10), np.zeros(10)
  for row, row_mask in zip(values["reverse_kl"], mask, strict=True):
    for i, x in enumerate(row[row_mask]):
      sums[10 * i // row_mask.sum()] += x
      counts[10 * i // row_mask.sum()] += 1
  for n in range(10):
    got = dense.metrics[f"reverse_kl_tenth_{n + 1}/teacher"]
    np.testing.assert_allclose(got, sums[n] / counts[n], rtol=2e-5)


def test_a_tenth_without_tokens_is_not_a_number():
  mask = jnp.arange(8)[None] < 3
  tenth = np.array(diagnosis.tenths(mask))[0, :3]
  assert tenth.tolist() == [0, 3, 6]
  assert np.isnan(diagnosis._mean(jnp.ones((1, 8)), mask & (diagnosis.tenths(mask) == 1)))


def test_top_k_scores_give_the_same_but_for_an_estimate_of_the_kl(problem, wanted):
  *_, logp = problem
  batch, (values, ratio, _, mask) = problem[3], wanted
  ids = np.argsort(-logp, -1, kind="stable")[..., :64]
  at = lambda ids: jnp.asarray(np.take_along_axis(logp, ids, -1), jnp.float32)
  targets = TopKTargets(
    ids_BTK=jnp.asarray(ids[..., ::-1], jnp.int32),  # in any order
    logp_BTK=at(ids[..., ::-1]),
    label_logp_BT=at(np.array(batch.labels_BT)[..., None])[..., 0],
  )
  metrics = diagnose(problem, targets).metrics
  for key in ("overlap", "student_mass"):
    np.testing.assert_allclose(metrics[f"{key}/teacher"], values[key][mask].mean(), rtol=2e-5)
  np.testing.assert_allclose(metrics["reverse_kl/teacher"], ratio[mask].mean(), rtol=2e-5)
  ours = np.argsort(-problem[4], -1, kind="stable")[..., :TOP]
  is_ours = (ids[..., None] == ours[..., None, :]).any(-1)  # of the stored tokens
  stored = np.where(is_ours, np.exp(np.take_along_axis(logp, ids, -1)), 0).sum(-1)[mask].mean()
  np.testing.assert_allclose(metrics["teacher_mass/teacher"], stored, rtol=2e-5)
  assert stored <= values["teacher_mass"][mask].mean()


def test_sampled_scores_estimate_the_teachers_mass_without_bias(problem, wanted):
  *_, logp = problem
  values, _, _, mask = wanted
  p = np.exp(logp)
  targets = SampledTargets(  # every token, each with its probability: the expectation
    ids_BTK=jnp.broadcast_to(jnp.arange(p.shape[-1]), p.shape),
    weight_BTK=jnp.asarray(p, jnp.float32),
    entropy_BT=jnp.asarray(-(p * logp).sum(-1), jnp.float32),
  )
  metrics = diagnose(problem, targets).metrics
  want = values["teacher_mass"][mask].mean()
  np.testing.assert_allclose(metrics["teacher_mass/teacher"], want, rtol=2e-5)
  assert not {"overlap/teacher", "student_mass/teacher", "reverse_kl/teacher"} & metrics.keys()


def test_scores_of_labels_give_the_log_ratio_alone(problem, wanted):
  *_, logp = problem
  at = np.take_along_axis(logp, np.array(problem[3].labels_BT)[..., None], -1)[..., 0]
  metrics = diagnose(problem, LabelTargets(label_logp_BT=jnp.asarray(at, jnp.float32))).metrics
  _, ratio, _, mask = wanted
  np.testing.assert_allclose(metrics["reverse_kl/teacher"], ratio[mask].mean(), rtol=2e-5)
  assert not [k for k in metrics if k.startswith(("overlap", "student_mass", "teacher_mass"))]


def test_a_student_that_is_its_own_teacher_differs_in_nothing(problem):
  step, state, _, batch, logq, _ = problem
  metrics = diagnose((step, state, state.params, batch, logq, logq)).metrics
  assert metrics["overlap/teacher"] == 1
  assert metrics["reverse_kl/teacher"] == 0  # both are the same numbers


def test_the_texts_hold_each_token_s_numbers(dense, wanted, problem):
  values, *_ = wanted
  rows, logq = [0, 2, 5], problem[4]  # of 8
  texts = dense.texts
  np.testing.assert_array_equal(texts["label"], problem[3].labels_BT[np.array(rows)])
  mask = texts["mask"]
  got = texts["teachers"]["teacher"]["reverse_kl"]
  np.testing.assert_allclose(got[mask], values["reverse_kl"][rows][mask], rtol=1e-4)
  want = np.sort(np.exp(logq[rows]), -1)[..., : -diagnosis.TOP_SHOWN - 1 : -1]
  np.testing.assert_allclose(texts["student"]["top_p"][mask], want[mask], rtol=1e-4)


def test_only_the_first_microbatch_is_diagnosed(problem, wanted):
  step, *rest = problem
  metrics = diagnose((steps.make_step(accumulate=4), *rest)).metrics
  values, _, _, mask = wanted
  rows = slice(0, None, 4)
  want = values["reverse_kl"][rows][mask[rows]].mean()
  np.testing.assert_allclose(metrics["reverse_kl/teacher"], want, rtol=2e-5)


@pytest.mark.slow
def test_a_mesh_changes_nothing(problem, dense):
  step, state, teacher, batch, *_ = problem
  mesh = sharding.make_mesh(1, 2, 1, 2, devices=jax.devices()[:4])
  with jax.set_mesh(mesh):
    put = lambda model: jax.device_put(model, sharding.shardings(model, mesh, step.student.rules))
    spread = jax.device_put(batch, sharding.batch_sharding(mesh))
    state = types.SimpleNamespace(params=put(state.params))
    run = lambda params, batch, teachers: diagnosis.Diagnosis(step)(
      types.SimpleNamespace(params=params), batch, teachers
    )
    got = jax.jit(run, out_shardings=sharding.replicated(mesh))(
      state.params, spread, {"teacher": put(teacher)}
    )
  assert got.metrics.keys() == dense.metrics.keys()
  for key, x in got.metrics.items():
    np.testing.assert_allclose(x, dense.metrics[key], rtol=1e-4, err_msg=key)


@pytest.mark.parametrize(
  ("options", "metrics", "message"),
  [
    ({"max_drift": 0.1}, {"drift": 0.2}, "differ from those at their sampling by 0.2 nats"),
    ({"max_drift": 0.1}, {"drift": 0.0, "drift/math": float("nan")}, "by nan nats on average"),
    ({"min_overlap": 0.5}, {"overlap/math": 0.25}, "25% of the 16 .* the teacher 'math'"),
    ({"min_overlap": 0.5}, {"overlap/math": float("nan")}, "nan% of the 16"),
  ],
)
def test_a_value_beyond_its_limit_stops_the_run(options, metrics, message):
  with pytest.raises(InputError, match=f"Before step 30, .*{message}"):
    diagnosis.check_limits(OnPolicyOptions(**options), metrics, 30)


def test_values_within_their_limits_pass():
  metrics = {"drift": 0.1, "overlap/a": 0.5, "overlap/b": 1.0}
  diagnosis.check_limits(OnPolicyOptions(max_drift=0.1, min_overlap=0.5), metrics, 0)
  diagnosis.check_limits(OnPolicyOptions(), {"drift": 9.0, "overlap/a": 0.0}, 0)


@pytest.mark.parametrize(("every", "steps"), [(1, [0, 10, 20]), (4, [0, 12, 20]), (25, [0, 25])])
def test_rounds_are_diagnosed_once_in_ten_steps_at_most(every, steps):
  assert [s for s in range(0, 30, every) if diagnosis.due(s, every)] == steps


def test_metrics_have_the_name_of_one_of_several_teachers():
  metrics = {"drift": 0.5, "overlap/teacher": 1.0, "reverse_kl_tenth_1/teacher": 2.0}
  assert diagnosis.named(metrics, "teacher") == metrics
  named = {"drift/math": 0.5, "overlap/math": 1.0, "reverse_kl_tenth_1/math": 2.0}
  assert diagnosis.named(metrics, "math") == named
