"""Tests of divergences over all kinds of targets: values and gradients against float64 formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.errors import InputError
from distill_jax.losses import (
  DenseTargets,
  SampledTargets,
  TopKTargets,
  divergences,
  kd,
  pseudo_label,
)
from distill_jax.losses.targets import check_unbiased
from distill_jax.schedules import constant
from distill_jax.types import Batch

B, C, V, D = 2, 5, 41, 7


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def kl(a, b):
  return (a * np.log(a / b)).sum(-1)


def adaptive(p, q, mass=0.5):
  order = np.argsort(-p, -1)
  ps = np.take_along_axis(p, order, -1)
  head = np.take_along_axis(np.cumsum(ps, -1) - ps < mass, np.argsort(order, -1), -1)
  gap = np.abs(p - q)
  share = (gap * head).sum(-1) / gap.sum(-1)
  return share, share * kl(p, q) + (1 - share) * kl(q, p)


def ab(p, q, a, b):
  return -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum(-1) / (a * b)


# name, parameters, formula in float64 numpy
FORMULAS = [
  ("forward_kl", {}, kl),
  ("reverse_kl", {}, lambda p, q: kl(q, p)),
  ("jensen_shannon", {}, lambda p, q: 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2)),
  (
    "jensen_shannon",
    {"beta": 0.2},
    lambda p, q: 0.2 * kl(p, 0.2 * p + 0.8 * q) + 0.8 * kl(q, 0.2 * p + 0.8 * q),
  ),
  ("jensen_shannon", {"beta": 0.0}, kl),
  ("jensen_shannon", {"beta": 1.0}, lambda p, q: kl(q, p)),
  ("skew_kl", {"alpha": 0.1}, lambda p, q: kl(p, 0.1 * p + 0.9 * q)),
  ("skew_reverse_kl", {"alpha": 0.3}, lambda p, q: kl(q, 0.3 * q + 0.7 * p)),
  ("adaptive_kl", {}, lambda p, q: adaptive(p, q)[1]),
  ("alpha_beta", {"alpha": 0.2, "beta": 0.7}, lambda p, q: ab(p, q, 0.2, 0.7)),
  ("total_variation", {}, lambda p, q: 0.5 * np.abs(p - q).sum(-1)),
]
IDS = [f"{n}{tuple(p.values())}" for n, p, _ in FORMULAS]


@pytest.fixture(scope="module")
def problem():
  rng = np.random.default_rng(0)
  return rng.normal(size=(B, C, V)) * 3, rng.normal(size=(B, C, D)), rng.normal(size=(V, D))


def numerical_gradient(loss, z, eps=1e-6):
  """Returns the gradient by central differences in float64, of the sum over positions."""
  grad = np.zeros_like(z)
  for v in range(z.shape[-1]):
    step = np.zeros(z.shape[-1])
    step[v] = eps
    grad[..., v] = (loss(z + step) - loss(z - step)) / (2 * eps)
  return grad


def value_and_grad(name, parameters, targets, z, T=1.0):
  terms = divergences.named(name, parameters)
  value, pull = jax.vjp(lambda z: targets.divergence(terms, z, T), jnp.asarray(z, jnp.float32))
  return value, pull(np.ones(value.shape, np.float32))[0]


def dense_targets(problem):
  _, hidden, head = problem
  return DenseTargets(hidden_BTD=jnp.float32(hidden), head_VD=jnp.float32(head)), hidden @ head.T


@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize("name, parameters, formula", FORMULAS, ids=IDS)
def test_dense(problem, name, parameters, formula, T):
  z, (targets, teacher) = problem[0], dense_targets(problem)
  p = softmax(teacher / T)
  got, grad = value_and_grad(name, parameters, targets, z, T)
  # float32 logits of size 10 have an error of 1e-6, and so do log-probabilities.
  np.testing.assert_allclose(got, formula(p, softmax(z / T)), rtol=3e-6, atol=1e-6)
  if name == "adaptive_kl":  # the shares have no gradient, so they are held fixed
    share, _ = adaptive(p, softmax(z / T))
    formula = lambda p, q: share * kl(p, q) + (1 - share) * kl(q, p)
  want = numerical_gradient(lambda z: formula(p, softmax(z / T)), z)
  np.testing.assert_allclose(grad, want, atol=3e-6)


@pytest.mark.parametrize("name, parameters, formula", FORMULAS, ids=IDS)
def test_top_k_with_a_tail_is_exact_over_k_plus_1_outcomes(problem, name, parameters, formula):
  z, k = problem[0], 6
  p = softmax(dense_targets(problem)[1])
  ids = np.argsort(-p, -1)[..., :k]

  def with_tail(x):
    inside = np.take_along_axis(x, ids, -1)
    return np.concatenate([inside, 1 - inside.sum(-1, keepdims=True)], -1)

  logp = np.log(np.take_along_axis(p, ids, -1))
  # A seventh entry that is not used, as in padding.
  unused = lambda x, fill: np.concatenate([x, np.full((B, C, 1), fill)], -1)
  targets = TopKTargets(
    ids_BTK=jnp.asarray(unused(ids, 0), jnp.int32), logp_BTK=jnp.float32(unused(logp, -np.inf))
  )
  got, grad = value_and_grad(name, parameters, targets, z)
  exact = formula(with_tail(p), with_tail(softmax(z)))
  np.testing.assert_allclose(got, exact, rtol=2e-5, atol=2e-6)
  if name == "adaptive_kl":
    share, _ = adaptive(with_tail(p), with_tail(softmax(z)))
    formula = lambda p, q: share * kl(p, q) + (1 - share) * kl(q, p)
  want = numerical_gradient(lambda z: formula(with_tail(p), with_tail(softmax(z))), z)
  np.testing.assert_allclose(grad, want, atol=5e-6)


@pytest.mark.parametrize("T", [1.0, 2.0])
def test_top_k_renormalised(problem, T):
  z, k = problem[0], 6
  p = softmax(dense_targets(problem)[1])
  ids = np.argsort(-p, -1)[..., :k]
  take = lambda x: np.take_along_axis(x, ids, -1)
  targets = TopKTargets(
    ids_BTK=jnp.asarray(ids, jnp.int32),
    logp_BTK=jnp.float32(np.log(take(p))),
    missing_mass="renormalise",
  )
  got, grad = value_and_grad("forward_kl", {}, targets, z, T)
  pk = softmax(np.log(take(p)) / T)
  np.testing.assert_allclose(got, kl(pk, softmax(take(z) / T)), rtol=2e-5, atol=1e-6)
  want = numerical_gradient(lambda z: kl(pk, softmax(take(z) / T)), z)
  np.testing.assert_allclose(grad, want, atol=3e-6)


def sampled_everything(p, n=10**6):
  """Returns records in which every token is drawn exactly p n times, i.e. their expectation."""
  ids = np.broadcast_to(np.arange(V), p.shape)
  entropy = -(p * np.log(p)).sum(-1)
  return SampledTargets(
    ids_BTK=jnp.asarray(ids, jnp.int32),
    weight_BTK=jnp.float32(p),
    logp_BTK=jnp.float32(np.log(p)),
    entropy_BT=jnp.float32(entropy),
  )


@pytest.mark.parametrize(
  "name, parameters, formula",
  [f for f in FORMULAS if f[0] != "adaptive_kl"],
  ids=[i for i in IDS if "adaptive" not in i],
)
def test_sampled_with_logp_is_unbiased(problem, name, parameters, formula):
  """The estimate is linear in the weights, so at their expectation it equals the divergence."""
  z = problem[0]
  p = softmax(dense_targets(problem)[1])
  got, grad = value_and_grad(name, parameters, sampled_everything(p), z)
  np.testing.assert_allclose(got, formula(p, softmax(z)), rtol=1e-5, atol=2e-6)
  want = numerical_gradient(lambda z: formula(p, softmax(z)), z)
  np.testing.assert_allclose(grad, want, atol=5e-6)


@pytest.mark.parametrize("T", [0.5, 1.0, 3.0])
def test_forward_kl_from_counts_and_at_other_temperatures(problem, T):
  z, rest = problem[0], problem[1:]
  p = softmax(dense_targets((z, *rest))[1])
  with_logp = sampled_everything(p)
  pT = softmax(np.log(p) / T)
  loss = kd.Loss(temperature=constant(T))
  batch = Batch(None, None, None, {"teacher": with_logp})
  got = loss.token_loss(jnp.float32(z), batch, 0)
  np.testing.assert_allclose(got, T**2 * kl(pT, softmax(z / T)), rtol=2e-5, atol=1e-5)
  if T == 1:
    counts = with_logp.replace(logp_BTK=None)
    got = loss.token_loss(jnp.float32(z), batch.replace(targets={"teacher": counts}), 0)
    np.testing.assert_allclose(got, kl(p, softmax(z)), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("T", [0.7, 2.0])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_records_of_another_temperature_than_1(problem, name, T):
  """Records of temperature 2 hold probabilities at it; those with logp have every temperature."""
  recorded = 2.0
  z = problem[0]
  teacher = dense_targets(problem)[1]
  p, q = softmax(teacher / T), softmax(z / T)
  formula = {"forward_kl": lambda q: kl(p, q), "reverse_kl": lambda q: kl(q, p)}[name]
  stored = softmax(teacher / recorded)
  targets = [sampled_everything(stored).replace(temperature=recorded)]
  if recorded == T:
    ids = np.argsort(-stored, -1)[..., : V - 1]  # of one token, the tail is that token
    top = np.take_along_axis(stored, ids, -1)
    targets.append(
      TopKTargets(
        ids_BTK=jnp.asarray(ids, jnp.int32), logp_BTK=jnp.float32(np.log(top)), temperature=T
      )
    )
    if name == "forward_kl":
      targets.append(targets[0].replace(logp_BTK=None))
  loss = kd.Loss(temperature=constant(T), divergence=name)
  want = numerical_gradient(lambda z: formula(softmax(z / T)), z)
  for one in targets:
    batch = Batch(None, None, None, {"teacher": one})
    got, pull = jax.vjp(
      lambda z, batch=batch: loss.token_loss(z, batch, 0) / T**2, jnp.asarray(z, jnp.float32)
    )
    np.testing.assert_allclose(got, formula(q), rtol=3e-5, atol=2e-6)
    # Of T = 0.7, probabilities have the power 2 / 0.7 and with it 3 times the rounding errors.
    np.testing.assert_allclose(pull(jnp.ones_like(got))[0], want, atol=1e-5)


def test_unused_entries_of_samples_at_a_row_without_probability_add_nothing(problem):
  """Tasks share a head: row 0, the id of unused entries, may belong to another task."""
  z = np.float32(problem[0]).copy()
  z[..., 0] = -np.inf
  ids, weight = np.zeros((B, C, 3), np.int32), np.zeros((B, C, 3), np.float32)
  ids[..., :2], weight[..., :2] = (5, 9), (0.25, 0.75)
  targets = SampledTargets(
    ids_BTK=jnp.asarray(ids), weight_BTK=jnp.asarray(weight), entropy_BT=jnp.zeros((B, C))
  )
  got, pull = jax.vjp(lambda z: targets.forward_kl(z, 1.0), jnp.asarray(z))
  q = softmax(np.float64(z))
  np.testing.assert_allclose(got, -0.25 * np.log(q[..., 5]) - 0.75 * np.log(q[..., 9]), rtol=1e-5)
  assert np.isfinite(pull(jnp.ones_like(got))[0][..., 1:]).all()


def test_the_pseudo_label_skips_positions_without_targets(problem):
  """A mixture with text has zeros in place of its targets, and 0 is a token."""
  z = jnp.float32(problem[0])
  weight = np.ones((B, C, 1), np.float32)
  weight[0] = 0
  targets = SampledTargets(
    ids_BTK=jnp.full((B, C, 1), 7),
    weight_BTK=jnp.asarray(weight),
    argmax_BT=jnp.full((B, C), 7).at[0].set(0),
  )
  loss = pseudo_label.Loss().token_loss(z, Batch(None, None, None, {"teacher": targets}), 0)
  assert not loss[0].any()
  np.testing.assert_allclose(loss[1], -np.log(softmax(np.float64(z))[1, :, 7]), rtol=1e-5)


@pytest.mark.parametrize("name", divergences.ALL)
def test_divergences_are_nonnegative_and_have_no_gradient_at_equality(name):
  """With logits of size 30 and V=50,000, plain sums of p (log p - log q) reach -2e-6 for p = q."""
  rng = np.random.default_rng(1)
  z = jnp.float32(rng.normal(size=(1, 8, 50_000)) * 6)
  shifted = z + jnp.float32(11.3)  # the same distribution with other rounding errors
  logp, logq = jax.nn.log_softmax(z), jax.nn.log_softmax(shifted)
  terms = divergences.named(name)
  assert float(terms(logp, logq).sum(-1).min()) >= -1e-7
  assert float(jnp.abs(terms(logp, logq).sum(-1)).max()) < 3e-6
  grad = jax.grad(lambda q: terms(logp, jax.nn.log_softmax(q)).sum())(z)
  if name != "total_variation":  # its gradient jumps at p = q
    assert float(jnp.abs(grad).max()) < 3e-6


def test_jensen_shannon_tends_to_both_kls(problem):
  p, q = softmax(dense_targets(problem)[1] / 3), softmax(problem[0] / 3)
  logp, logq = jnp.float32(np.log(p)), jnp.float32(np.log(q))
  near = lambda beta: divergences.jensen_shannon(logp, logq, beta).sum(-1)
  np.testing.assert_allclose(near(1e-3) / 1e-3, kl(p, q), rtol=0.02)
  np.testing.assert_allclose(near(1 - 1e-3) / 1e-3, kl(q, p), rtol=0.02)


def test_extreme_logits_are_finite():
  """Teacher and student each put all mass on one token, and the tokens differ."""
  z = jnp.full((1, 1, V), -1e4).at[0, 0, 3].set(1e4)
  logp = jax.nn.log_softmax(jnp.roll(z, 1, -1))
  for name in divergences.ALL:
    terms = divergences.named(name)
    loss = lambda z, terms=terms: terms(logp, jax.nn.log_softmax(z)).sum()
    value, grad = jax.value_and_grad(loss)(z)
    assert np.isfinite(value), name
    assert np.all(np.isfinite(grad)), name


def test_padding_rows_have_no_probability(problem):
  """Padding rows of the head do not change the loss, as for 151,936 tokens in 152,064 rows."""
  z, hidden, head = problem
  small, _ = dense_targets(problem)
  wide = np.concatenate([np.float32(head), np.ones((3, D), np.float32)])
  want_of = {name: value_and_grad(name, {}, small, z) for name in divergences.ALL}
  for rows, pad in ((wide, 0), (np.float32(head), 3), (wide, 5)):
    targets = small.replace(head_VD=jnp.asarray(rows))
    padded = np.pad(np.float32(z), ((0, 0), (0, 0), (0, pad)), constant_values=-np.inf)
    for name, (want, want_grad) in want_of.items():
      if pad == 0:  # the student has V rows: the teacher's further rows are cut
        got, grad = value_and_grad(name, {}, targets, z)
      else:
        got, grad = value_and_grad(name, {}, targets, padded)
      np.testing.assert_allclose(got, want, rtol=1e-6)
      grad = np.asarray(grad)
      np.testing.assert_allclose(grad[..., :V], want_grad, atol=1e-6)
      assert not np.any(grad[..., V:])


@pytest.mark.parametrize(
  "args, message",
  [
    (("sampled", False, "reverse_kl", False), r"records\.logp=True or records\.kind=topk"),
    (("sampled", True, "adaptive_kl", False), r"Record with records\.kind=topk"),
    (("sampled", False, "forward_kl", True), "Record at that temperature"),
  ],
)
def test_records_that_would_bias_a_divergence_are_refused(args, message):
  with pytest.raises(InputError, match=message):
    check_unbiased(*args)


@pytest.mark.parametrize(
  "name, parameters, message",
  [
    ("forward", {}, "divergence is 'forward'; expected one of forward_kl"),
    ("forward_kl", {"alpha": 0.5}, r"parameters is {'alpha': 0\.5}; expected none for forward_kl"),
    ("skew_kl", {"alpha": 1.5}, r"parameters is {'alpha': 1\.5}; expected numbers from 0 to 1"),
    (
      "alpha_beta",
      {"alpha": 0.5, "beta": -0.5},
      r"is \(0\.5, -0\.5\); expected .* whose sum is not 0",
    ),
  ],
)
def test_unknown_divergences_and_invalid_parameters_are_refused(name, parameters, message):
  with pytest.raises(InputError, match=message):
    divergences.named(name, parameters)
  with pytest.raises(InputError, match=r"temperature is \(0\.0,\); expected values above 0"):
    kd.Loss(temperature=constant(0.0))
