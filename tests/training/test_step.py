"""Tests of the step: training does not depend on mesh, microbatches or padding."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow
from steps import V, make_batch, make_step, run

from distill_jax import config
from distill_jax.errors import InputError
from distill_jax.losses import kd
from distill_jax.models import llama
from distill_jax.models.trainables import Frozen, Lora
from distill_jax.nn import params, sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.nn.lora import LoraOptions
from distill_jax.schedules import constant
from distill_jax.training import optim
from distill_jax.training.outputs import run_teacher
from distill_jax.training.step import Fixed
from distill_jax.types import Batch


@functools.cache
def random_model(seed):
  return jax.jit(lambda key: llama.Model(llama.TINY, key))(jax.random.key(seed))


@pytest.fixture(scope="module")
def reference():
  return run(make_step())


@pytest.mark.smoke
def test_golden_three_steps(reference):
  """A trajectory pinned on 2026-11-24. If it changes on purpose, give the reason in the commit."""
  _, rows = reference
  golden = {
    "loss": [4.636097, 4.653410, 4.653963],
    "soft": [4.236650, 4.268010, 4.267819],
    "hard": [5.568142, 5.552679, 5.554965],
    "grad_norm": [0.605335, 0.719413, 0.562313],
    "learning_rate": [0.003333, 0.006667, 0.01],
    "tokens": [96, 81, 89],
  }
  for name, values in golden.items():
    assert [row[name] for row in rows] == pytest.approx(values, rel=1e-4), name


# The slow meshes have no axes, nor pairs of axes, that the others lack.
@pytest.mark.parametrize(
  "shape", [(2, 2, 1), (1, 2, 2), (1, 1, 2), *(slow.param(s) for s in ((4, 1, 1), (1, 4, 1)))]
)
def test_mesh_does_not_change_training(reference, shape):
  """Float32 sums in another order change metrics by 1e-5, and parameters by the noise of Adam."""
  state, rows = run(make_step(), shape)
  for row, want in zip(rows, reference[1], strict=True):
    for name in want:
      assert row[name] == pytest.approx(want[name], rel=1e-5), (name, shape)
  for (path, a), (_, b) in zip(
    params.named_params(state.params), params.named_params(reference[0].params), strict=True
  ):
    # Adam's first steps divide by a gradient that may be near 0: allow 1% of one update.
    np.testing.assert_allclose(a[...], b[...], atol=1e-4, err_msg=path)


def test_teacher_and_student_may_have_different_sharding_rules():
  """The teacher is sharded differently from the student, on one mesh; training is the same."""
  theirs = sharding.rules({"embed": ("", ""), "mlp": ("fsdp,tensor", "tensor")})
  assert dict(theirs.table)["mlp"] == (("fsdp", "tensor"), "tensor")
  _, want = run(make_step(), online=True)
  _, rows = run(make_step(teacher=ComputeConfig(rules=theirs)), (1, 2, 2), online=True)
  for row, wanted in zip(rows, want, strict=True):
    for name in wanted:
      assert row[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"embd": ("fsdp", "")}, "rules is 'embd'; expected logical axes among batch, seq"),
    ({"embed": ("fsdp",)}, "a pair .storage, compute. of mesh axes among data, fsdp"),
    ({"embed": ("model", "")}, "a pair .storage, compute. of mesh axes among data, fsdp"),
  ],
)
def test_invalid_sharding_rules_are_refused(changes, message):
  with pytest.raises(InputError, match=message):
    sharding.rules(changes)


@pytest.mark.parametrize("accumulate", [slow.param(2), slow.param(4), 8])
def test_accumulation_is_one_large_batch(reference, accumulate):
  _, rows = run(make_step(accumulate=accumulate))
  for row, want in zip(rows, reference[1], strict=True):
    for name in ("loss", "grad_norm", "soft", "hard", "kl/teacher", "tokens"):
      assert row[name] == pytest.approx(want[name], rel=1e-5), name


def test_accumulation_on_a_mesh(reference):
  _, rows = run(make_step(accumulate=2), (2, 2, 1))
  assert rows[-1]["loss"] == pytest.approx(reference[1][-1]["loss"], rel=1e-5)


@pytest.mark.parametrize("remat", ["full", slow.param("dots")])  # nn/test_remat.py has them all
def test_remat_does_not_change_training(reference, remat):
  _, rows = run(make_step(student=ComputeConfig(remat=remat)))
  assert rows[-1]["loss"] == pytest.approx(reference[1][-1]["loss"], rel=1e-6)


def test_nan_in_masked_positions_is_harmless(reference):
  """NaN in all masked targets does not change a bit of the result."""

  def poison(batch: Batch) -> Batch:
    t, out_BT = batch.targets["teacher"], ~batch.mask_BT
    t = t.replace(
      weight_BTK=jnp.where(out_BT[..., None], jnp.nan, t.weight_BTK),
      entropy_BT=jnp.where(out_BT, jnp.nan, t.entropy_BT),
    )
    return batch.replace(targets={"teacher": t})

  state, rows = run(make_step(), batches=[poison(make_batch(n)) for n in range(3)])
  assert rows == reference[1]
  jax.tree.map(np.testing.assert_array_equal, state, reference[0])


def test_identical_teacher_gives_no_kl_and_no_gradient():
  model = random_model(3)
  step = make_step(losses={"soft": kd.Loss(temperature=constant(2.0))})
  batch = make_batch().replace(targets={})
  metrics = jax.jit(step)(step.init(model), batch, {"teacher": model})[1]
  # 256 terms of p (log p - log q), each within float32 rounding of 0.
  assert abs(float(metrics["soft"])) < 1e-6
  assert abs(float(metrics["kl/teacher"])) < 1e-6
  assert float(metrics["grad_norm"]) < 1e-6


def test_online_targets_carry_no_gradient_to_the_teacher():
  model = random_model(3)
  batch = make_batch()
  total = lambda m: jnp.sum(run_teacher(m, batch.inputs, ComputeConfig())[0].hidden_BTD)
  assert all(not np.any(g) for g in jax.tree.leaves(jax.jit(jax.grad(total))(model)))


def test_norms_do_not_decay():
  """With gradient 0, the update is the weight decay."""
  model = random_model(0)
  tx = optim.optimizer(config.OptimOptions(weight_decay=0.1))
  zeros = jax.tree.map(jnp.zeros_like, model)
  update = jax.jit(lambda g, m: tx.update(g, tx.init(m), m, value=jnp.zeros(())))
  updates, _ = update(zeros, model)
  for (path, u), (_, v) in zip(
    params.named_params(updates), params.named_params(model), strict=True
  ):
    want = np.zeros(v.shape) if "norm" in path else 0.1 * np.asarray(v[...])
    np.testing.assert_allclose(u[...], want, rtol=1e-6, err_msg=path)


@pytest.mark.parametrize(
  "trainable", [Frozen(("model.embed_tokens",)), Lora(options=LoraOptions(rank=2))]
)
def test_what_is_frozen_has_no_gradient(trainable):
  """No operation has a result of the shape of the frozen embedding, which is also the head.

  The gradient of what is trained is that of a program that differentiates everything.
  """
  model, batch = random_model(0), make_batch()
  step = make_step(trainable=trainable, accumulate=2)
  trained = trainable.init(model, jax.random.key(1), pretrained=False)
  base = model if trainable.has_base else None
  part, rest = params.split(trained, trainable.frozen)
  state = step.init(trained)
  assert params.count(state.opt) == 2 * params.count(part) + 1
  made = rf"f32\[{V},{llama.TINY.hidden_size}\](?: \w+:\S+)* = "
  program = lambda fn, *args: str(jax.make_jaxpr(fn)(*args))
  assert not re.search(made, program(step, state, batch, {}, base))
  if trainable.has_base:
    return

  def loss(part, rest):
    fixed = Fixed({}, 0, 80.0, frozen=rest)
    weights = {name: fn.weight(0) for name, fn in step.losses.items()}
    return step.loss((part, {}), batch, fixed, weights)[0]

  whole = jax.grad(loss, argnums=(0, 1))
  assert re.search(made, program(whole, part, rest))
  got, want = jax.jit(jax.grad(loss))(part, rest), jax.jit(whole)(part, rest)[0]
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max())  # float32 sums


def test_plateau_halves_the_rate():
  tx = optim.optimizer(config.OptimOptions(plateau_patience=2, weight_decay=0.0))
  p = {"w": jnp.ones((2, 2))}
  state, sizes = tx.init(p), []
  for _ in range(8):  # the loss never improves
    updates, state = tx.update({"w": jnp.ones((2, 2))}, state, p, value=jnp.asarray(1.0))
    sizes.append(float(updates["w"][0, 0]))
  np.testing.assert_allclose(sizes, [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125], rtol=1e-6)


def test_the_logged_rate_is_the_one_of_the_plateau():
  tx = optim.optimizer(config.OptimOptions(plateau_patience=1, weight_decay=0.0))
  step = make_step(optimizer=tx, learning_rate=lambda _: jnp.ones(()))
  state, _ = run(step, batches=[make_batch(0)])
  (plateau,) = [s for s in state.opt if hasattr(s, "plateau_count")]
  lower = plateau._replace(best_value=jnp.full_like(plateau.best_value, -1.0))  # never improves
  stuck = state.replace(opt=tuple(lower if s is plateau else s for s in state.opt))
  after, metrics = jax.jit(step)(stuck, make_batch(1), {})
  scale = next(s.scale for s in after.opt if hasattr(s, "plateau_count"))
  assert metrics["learning_rate"] == scale == 0.5


def test_gradients_are_not_clipped_at_norm_0():
  g = {"w": jnp.full((2, 2), 1e3)}
  updates = []
  for clip in (0.0, 1e9):
    tx = optim.optimizer(config.OptimOptions(clip_norm=clip))
    updates.append(tx.update(g, tx.init(g), g, value=1.0)[0]["w"])
  np.testing.assert_array_equal(*updates)
  assert updates[0][0, 0] > 0.9


def test_the_second_moment_of_bfloat16_parameters_follows_the_gradient():
  """In bfloat16, it would neither reach the squared gradient nor fall again."""
  tx = optim.optimizer(config.OptimOptions(b2=0.999, clip_norm=1e9))
  p = {"w": jnp.ones((2, 2), jnp.bfloat16)}

  @jax.jit
  def steps(state, g):
    updates = {"w": jnp.full((2, 2), g)}  # the step's gradients are in float32
    return jax.lax.fori_loop(0, 3000, lambda _, s: tx.update(updates, s, p, value=1.0)[1], state)

  state, decay = tx.init(p), 0.999**3000
  for g, want in ((1.0, 1 - decay), (0.0, decay - decay**2)):
    state = steps(state, g)
    leaves = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(state)}
    (second,) = [x for path, x in leaves.items() if ".nu" in path]
    np.testing.assert_allclose(second, want, rtol=1e-3)


def test_gradients_of_bfloat16_microbatches_are_summed_in_float32():
  """The gradient of 8 equal microbatches is that of one of them."""
  model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_model(0))
  batch = make_batch()
  rows = jax.tree.map(lambda x: x[:1], batch)
  many = jax.tree.map(lambda x: jnp.repeat(x[:1], 8, 0), batch)
  norm = lambda b, n: jax.jit(make_step(accumulate=n))(make_step(accumulate=n).init(model), b, {})
  one, eight = norm(rows, 1)[1]["grad_norm"], norm(many, 8)[1]["grad_norm"]
  # Each microbatch is an eighth of the gradient, a power of two, so that only the sum is rounded.
  np.testing.assert_allclose(eight, one, rtol=1e-5)
