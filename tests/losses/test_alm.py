"""The loss on spans of text: its value, its gradient, and what it does not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distill_jax import losses
from distill_jax.errors import InputError
from distill_jax.losses import SampledTargets, SpanTargets
from distill_jax.nn import sharding
from distill_jax.types import Batch

B, T, D, V = 2, 12, 6, 23
# 0: no span. Spans of 1, 2, 3 and 5 labels; with chunks of 4 positions, two spans cross them.
LEFT = np.array(
  [[0, 1, 2, 1, 3, 2, 1, 0, 0, 1, 1, 0], [5, 4, 3, 2, 1, 0, 1, 2, 1, 3, 2, 1]], np.int32
)
MASK = LEFT > 0
MASK[0, 7] = True  # a label that is trained on, without a span
TEMPERATURE = 100.0


def problem():
  rng = np.random.default_rng(0)
  f32 = lambda x: jnp.asarray(x, jnp.float32)
  hidden, head = f32(rng.normal(size=(B, T, D))), f32(rng.normal(size=(V, D)))
  logp_BT = np.zeros((B, T))
  for row, start, end in spans():
    logp_BT[row, start : end + 1] = -rng.exponential(3.0 * (end + 1 - start))
  labels = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
  targets = SpanTargets(span_logp_BT=f32(logp_BT), span_left_BT=jnp.asarray(LEFT))
  return hidden, head, Batch(None, labels, jnp.asarray(MASK), {"teacher": targets})


def spans():
  """(row, first position, last position) of each span."""
  for row in range(B):
    start = 0
    for t in range(T):
      if LEFT[row, t] == 1:
        yield row, start, t
      if LEFT[row, t] <= 1:
        start = t + 1


def reference(hidden, head, batch):
  """The loss in float64, written out span by span from the formula of the paper."""
  z = np.float64(hidden) @ np.float64(head).T
  logq = z - np.log(np.exp(z).sum(-1, keepdims=True))
  logq = np.take_along_axis(logq, np.array(batch.labels_BT)[..., None], -1)[..., 0]
  total = 0.0
  for row, start, end in spans():
    a = float(batch.targets["teacher"].span_logp_BT[row, end]) / TEMPERATURE - 1e-6
    b = logq[row, start : end + 1].sum() / TEMPERATURE - 1e-6
    p, q = np.exp(a), np.exp(b)
    total += TEMPERATURE * (p * (a - b) + (1 - p) * (np.log1p(-p) - np.log1p(-q)))
  return total / MASK.sum()


def value_and_grad(hidden, head, batch, chunk=4, fn=None):
  mix = {"spans": fn or losses.ALM(temperature=TEMPERATURE)}
  run = lambda h, w: losses.fused_loss(mix, h, w, batch, chunk=chunk)
  return jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))(hidden, head)


def test_value_and_gradient_are_those_of_the_formula():
  """The gradient is compared with central differences of the float64 reference."""
  hidden, head, batch = problem()
  (loss, means), grads = value_and_grad(hidden, head, batch)
  np.testing.assert_allclose(loss, reference(hidden, head, batch), rtol=2e-5)  # float32
  np.testing.assert_allclose(means["spans"].value(), loss, rtol=1e-6)
  for i, x in enumerate((hidden, head)):
    rng, x = np.random.default_rng(i), np.float64(x)
    for _ in range(3):
      along = rng.normal(size=x.shape)
      moved = [(hidden, head, batch), (hidden, head, batch)]
      for n, step in enumerate((1e-4, -1e-4)):
        moved[n] = (*moved[n][:i], x + step * along, *moved[n][i + 1 :])
      want = (reference(*moved[0]) - reference(*moved[1])) / 2e-4
      np.testing.assert_allclose(np.sum(np.float64(grads[i]) * along), want, rtol=1e-4, atol=1e-6)


def test_chunks_of_the_head_and_logits_that_exist_do_not_change_it():
  hidden, head, batch = problem()
  (want, _), want_grads = value_and_grad(hidden, head, batch, chunk=T)
  (loss, _), grads = value_and_grad(hidden, head, batch, chunk=5)
  direct = lambda h: losses.logits_loss(
    {"spans": losses.ALM()}, jnp.einsum("btd,vd->btv", h, head), batch
  )[0]
  value, grad = jax.jit(jax.value_and_grad(direct))(hidden)
  np.testing.assert_allclose([loss, value], [want, want], rtol=1e-6)
  for got, expected in (*zip(grads, want_grads, strict=True), (grad, want_grads[0])):
    np.testing.assert_allclose(got, expected, atol=1e-7)


def test_spans_of_one_label_are_the_labels_of_records_in_the_same_tokens():
  hidden, head, batch = problem()
  logp_BT = jnp.asarray(-np.random.default_rng(1).exponential(2.0, (B, T)), jnp.float32)
  ones = SpanTargets(span_logp_BT=logp_BT, span_left_BT=jnp.asarray(MASK, jnp.int32))
  shape = (B, T, 1)
  records = SampledTargets(
    ids_BTK=jnp.zeros(shape, jnp.int32), weight_BTK=jnp.ones(shape), label_logp_BT=logp_BT
  )
  got, want = (
    value_and_grad(hidden, head, batch.replace(targets={"teacher": t})) for t in (ones, records)
  )
  np.testing.assert_allclose(got[0][0], want[0][0], rtol=1e-6)
  for a, b in zip(got[1], want[1], strict=True):
    np.testing.assert_allclose(a, b, atol=1e-7)


def test_a_student_that_equals_the_teacher_has_no_loss_and_extremes_are_finite():
  divergence = jax.jit(jax.vmap(jax.value_and_grad(losses.ALM()._divergence, argnums=1)))
  logp = jnp.array([0.0, -1e-7, -1e-3, -1.0, -80.0, -2e4])
  value, slope = divergence(logp, logp)
  np.testing.assert_allclose(value, 0, atol=1e-6)
  np.testing.assert_allclose(slope, 0, atol=1e-6)
  every = [x.ravel() for x in jnp.meshgrid(logp, logp)]
  assert all(np.isfinite(x).all() for x in divergence(*every))


def test_the_gradient_tends_to_that_of_poisson_distributions():
  """s = -log P and t = -log Q: the derivative of t - s + s log(s / t) by -t is s / t - 1."""
  slope = jax.jit(jax.vmap(jax.grad(losses.ALM(temperature=1e4)._divergence, argnums=1)))
  s, t = np.array([0.5, 3.0, 20.0]), np.array([1.0, 2.0, 25.0])
  # The next term of the series in 1 / temperature is of the order of t / temperature; epsilon
  # adds 0.01 to both.
  np.testing.assert_allclose(slope(jnp.float32(-s), jnp.float32(-t)), s / t - 1, atol=1e-2)


def on_mesh():
  """Returns the loss and its gradients with positions sharded over 4 devices."""
  hidden, head, batch = problem()
  mesh = sharding.make_mesh(context=4, devices=jax.devices()[:4])
  with jax.set_mesh(mesh):
    positions = NamedSharding(mesh, P(sharding.BATCH, sharding.SEQ))
    hidden, batch = jax.device_put((hidden, batch), positions)
    run = lambda h, w: losses.fused_loss(
      {"spans": losses.ALM()}, h, w, batch, chunk=4, seq_axis=sharding.SEQ
    )[0]
    return jax.device_get(jax.jit(jax.value_and_grad(run, argnums=(0, 1)))(hidden, head))


def test_spans_that_cross_devices_are_summed():
  """Positions are sharded over 4 devices of 3 positions each."""
  (want, _), want_grads = value_and_grad(*problem())
  loss, grads = on_mesh()
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  for got, expected in zip(grads, want_grads, strict=True):
    np.testing.assert_allclose(got, expected, atol=1e-7)


def test_losses_and_records_that_do_not_fit_are_refused():
  hidden, head, batch = problem()
  with pytest.raises(InputError, match="loss 'kd' needs targets in the student's tokens"):
    losses.fused_loss({"soft": losses.KD()}, hidden, head, batch)
  with pytest.raises(InputError, match="records.temperature is 2.0; expected 1"):
    losses.ALM().check_records("topk", True, 2.0, "tail_bucket")
  with pytest.raises(InputError, match="temperature is 0; expected a number above 0"):
    losses.ALM(temperature=0)


def test_hard_labels_do_not_need_the_spans():
  hidden, head, batch = problem()
  loss = jax.jit(lambda b: losses.fused_loss({"hard": losses.CE()}, hidden, head, b)[0])
  np.testing.assert_array_equal(loss(batch), loss(batch.replace(targets={})))
