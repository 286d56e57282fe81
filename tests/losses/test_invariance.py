"""Tests of all losses: gradients do not depend on microbatches, packing or padding; no NaN."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from distill_jax import registry
from distill_jax.losses import (
  FeatureLoss,
  LabelTargets,
  SampledTargets,
  SpanTargets,
  TopKTargets,
  alm,
  ce,
  embedding,
  hidden,
  kd,
  log_ratio,
  mixture,
  policy_gradient,
  pseudo_label,
  relational,
  relations,
)
from distill_jax.losses.features import Features
from distill_jax.models import llama
from distill_jax.nn.layers import ComputeConfig
from distill_jax.schedules import constant
from distill_jax.training.step import Step
from distill_jax.types import Batch, Inputs, Output, Rollout

B, T, D, K, V = 4, 20, 8, 5, 64


@dataclasses.dataclass(frozen=True)
class Shape(llama.Config):
  """The properties of a config that losses use."""

  embedding_size = D


SHAPE = Shape(**vars(dataclasses.replace(llama.TINY, num_hidden_layers=2)))
CASES = {  # name: (loss, the targets it reads)
  "ce": (ce.Loss(), ""),
  "ce smoothed": (ce.Loss(label_smoothing=0.1, z_loss=0.01), ""),
  "kd sampled": (kd.Loss(temperature=constant(2.0)), "sampled"),
  "kd topk": (kd.Loss(divergence="jensen_shannon"), "topk"),
  "kd online": (kd.Loss(divergence="reverse_kl", temperature=constant(2.0)), "online"),
  "mixture": (mixture.Loss(by="entropy", label_trust=0.5), "online"),
  "alm": (alm.Loss(), "spans"),
  "policy_gradient": (policy_gradient.Loss(reward_weight=0.5), "labels"),
  "log_ratio": (log_ratio.Loss(), "online"),
  "pseudo_label": (pseudo_label.Loss(), "online"),
  "hidden mse": (hidden.Loss(layers="uniform"), "online"),
  "hidden cosine": (hidden.Loss(distance="cosine"), "online"),
  "embedding": (embedding.Loss(), "online"),
  "relations": (relations.Loss(heads=2), "online"),
  "relational": (relational.Loss(tokens=8), "online"),
}
WHOLE = {name: fn for name, (fn, _) in CASES.items() if isinstance(fn, FeatureLoss)}
CAPTURE = optax.GradientTransformationExtraArgs(  # the optimizer's state is the gradient
  lambda params: jax.tree.map(jnp.zeros_like, params), lambda g, state, *_, **__: (g, g)
)


class Toy(struct.PyTreeNode):
  """A model without layers that compiles quickly: each feature is a product of embeddings."""

  embed_VD: jax.Array
  layers_LDD: jax.Array

  @classmethod
  def init(cls, seed: int):
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    rng = np.random.default_rng(seed)
    return cls(draw(V, D), draw(2, D, D) / D**0.5)

  def __call__(self, inputs, compute, taps=()):
    del compute
    turn_BT = jnp.cos(inputs.positions_BT)[
      ..., None
    ]  # makes features depend on the position in a document
    x_BTD = self.embed_VD[inputs.tokens_BT] * turn_BT
    taps_PBTD = jnp.stack([x_BTD @ self.layers_LDD[i] for i in taps]) if taps else None
    out_BTD = jnp.tanh(x_BTD @ self.layers_LDD[0])
    return Output(out_BTD, self.embed_VD, taps_PBTD=taps_PBTD, embedding_BTD=out_BTD)

  def qkv(self, layer, x_BTD, inputs, compute):
    del inputs, compute
    heads = (x_BTD @ self.layers_LDD[layer]).reshape(*x_BTD.shape[:2], 2, D // 2)
    return heads, heads[..., ::-1], 2 * heads


def test_every_loss_is_covered():
  assert {type(fn).__module__.rpartition(".")[2] for fn, _ in CASES.values()} == {
    *registry.names("losses")
  }


def documents() -> list[dict[str, np.ndarray]]:
  """Returns two documents per row, of 5 to 10 tokens, with targets of a teacher."""
  rng, docs = np.random.default_rng(0), []
  for _ in range(2 * B):
    n = rng.integers(5, 11)
    tokens = rng.integers(0, V, n)
    weight = rng.dirichlet(np.ones(K), n)
    mask = rng.random(n) < 0.7
    pairs = (np.arange(n) % 2 == 0) & mask & np.append(mask[1:], False)  # spans of two labels
    docs.append(
      {
        "tokens": tokens,
        "labels": np.roll(tokens, -1),
        "mask": mask,
        "positions": np.arange(n),
        "ids": np.argsort(rng.random((n, V)), -1)[:, :K],
        "weight": weight,
        "entropy": -(weight * np.log(weight)).sum(-1),
        "logp": np.log(0.8 * weight),
        "label_logp": -rng.gamma(2, 2, n),
        "behaviour_logp": -rng.gamma(2, 2, n),
        "reward": np.full(n, rng.random()),
        "span_logp": -1.0 - np.arange(n) // 2,
        "span_left": mask + pairs.astype(int),
      }
    )
  return docs


def packed(rows: list[tuple[int, int]], kind: str) -> Batch:
  """Returns a batch whose rows hold these documents and padding."""
  docs = documents()

  def laid_out(name):
    x_BT = np.zeros((len(rows), T, *docs[0][name].shape[1:]), docs[0][name].dtype)
    for row, pair in zip(x_BT, rows, strict=True):
      joined = np.concatenate([docs[d][name] for d in pair])
      row[: len(joined)] = joined
    return jnp.asarray(x_BT, {"f": jnp.float32, "i": jnp.int32, "b": bool}[x_BT.dtype.kind])

  lengths = [[len(docs[d]["tokens"]) for d in pair] for pair in rows]
  segments = np.array([[1] * a + [2] * b + [0] * (T - a - b) for a, b in lengths])
  targets = {
    "sampled": SampledTargets(
      ids_BTK=laid_out("ids"),
      weight_BTK=laid_out("weight"),
      entropy_BT=laid_out("entropy"),
      temperature=CASES["kd sampled"][0].temperature.values[0],
    ),
    "topk": TopKTargets(ids_BTK=laid_out("ids"), logp_BTK=laid_out("logp")),
    "labels": LabelTargets(label_logp_BT=laid_out("label_logp")),
    "spans": SpanTargets(span_logp_BT=laid_out("span_logp"), span_left_BT=laid_out("span_left")),
  }
  inputs = Inputs(laid_out("tokens"), laid_out("positions"), jnp.asarray(segments, jnp.int32))
  of_teachers = {"teacher": targets[kind]} if kind in targets else {}
  rollout = Rollout(laid_out("behaviour_logp"), laid_out("reward"))
  return Batch(inputs, laid_out("labels"), laid_out("mask"), of_teachers, rollout=rollout)


ROWS = [(0, 1), (2, 3), (4, 5), (6, 7)]


@functools.cache
def program(name: str, accumulate: int):
  fn, _ = CASES[name]
  step = Step(
    losses={"it": fn},
    learning_rate=lambda _: jnp.zeros(()),
    optimizer=CAPTURE,
    student=ComputeConfig(),
    teacher=ComputeConfig(),
    chunk=6,
    accumulate=accumulate,
    student_config=SHAPE,
    teacher_configs={"teacher": SHAPE},
  )
  return step, jax.jit(step)


def gradient(name: str, batch: Batch, accumulate: int = 1):
  """Returns (loss, gradient) of a training step."""
  step, compiled = program(name, accumulate)
  teachers = {"teacher": Toy.init(1)} if CASES[name][1] == "online" else {}
  state, metrics = compiled(step.init(Toy.init(0)), batch, teachers)
  return metrics["loss"], state.opt


def assert_same(got, want):
  """Checks gradients to 1e-5 of the largest one of a leaf: float32 sums in another order."""
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
  largest = max(float(jnp.abs(w).max()) for w in jax.tree.leaves(want[1]))
  assert largest > 0
  for g, w in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
    np.testing.assert_allclose(g, w, atol=1e-5 * max(np.abs(w).max(), 0.01 * largest))


@pytest.mark.parametrize("name", CASES)
def test_accumulation_and_packing(name):
  """The gradient is equal for 1 and 4 microbatches, and for another order of documents."""
  kind = CASES[name][1]
  want = gradient(name, packed(ROWS, kind))
  # Two rows each are another case only for losses that compare rows or weigh tokens.
  for accumulate in (2, 4) if name in ("ce", "kd topk", "relational") else (4,):
    assert_same(gradient(name, packed(ROWS, kind), accumulate), want)
  other = [(7, 2), (1, 4), (0, 5), (6, 3)]
  assert_same(gradient(name, packed(other, kind)), want)


@pytest.mark.parametrize("name", CASES)
def test_a_row_without_labels_does_not_change_the_gradient(name):
  """An additional row that is fully masked does not change the gradient."""
  kind = CASES[name][1]
  want = gradient(name, packed(ROWS[:3], kind))
  batch = packed(ROWS, kind)
  masked = batch.replace(mask_BT=batch.mask_BT.at[3].set(False))
  assert_same(gradient(name, masked), want)
  nothing = batch.replace(mask_BT=jnp.zeros_like(batch.mask_BT))
  loss, grads = gradient(name, nothing)
  assert loss == 0
  assert all(not np.any(g) for g in jax.tree.leaves(grads))  # NaN counts as any


def features(seed: int) -> Features:
  rng = np.random.default_rng(seed)
  heads = (np.float32(rng.normal(size=(B, T, 2, D // 2))) for _ in range(3))
  hidden_BTD = np.float32(rng.normal(size=(B, T, D)))
  return Features({1: hidden_BTD}, {1: tuple(heads)}, hidden_BTD)


@functools.cache
def whole_program(name: str):
  loss = lambda s, t, batch: WHOLE[name].feature_loss(s, t, {}, batch, ((1, 1),)).value()
  return jax.jit(jax.value_and_grad(loss))


def put(tree: Features, where_BT: np.ndarray, value: float) -> Features:
  at = lambda x: where_BT.reshape(B, T, *[1] * (x.ndim - 2))
  return jax.tree.map(lambda x: np.where(at(x), np.float32(value), x), tree)


@pytest.mark.parametrize("name", WHOLE)
def test_vectors_of_length_zero_give_no_nan(name):
  """Some or all vectors of the student, the teacher or both are zero."""
  batch, some = packed(ROWS, ""), np.arange(T)[None] % 3 == 0
  every = np.ones((B, T), bool)
  for where in (np.broadcast_to(some, (B, T)), every):
    for zero_s, zero_t in ((True, False), (False, True), (True, True)):
      s, t = features(0), features(1)
      s, t = (put(s, where, 0) if zero_s else s), (put(t, where, 0) if zero_t else t)
      loss, grads = whole_program(name)(s, t, batch)
      assert np.isfinite(loss)
      assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", WHOLE)
def test_nan_in_masked_positions_does_not_reach_the_gradient(name):
  """NaN is in masked positions; for relations in padding, because masked tokens are attended to."""
  batch = packed(ROWS, "")
  inside = batch.inputs.segments_BT > 0 if name == "relations" else batch.mask_BT
  out = ~np.asarray(inside)
  s, t = features(0), features(1)
  want_loss, want = whole_program(name)(s, t, batch)
  loss, grads = whole_program(name)(put(s, out, np.nan), put(t, out, np.nan), batch)
  np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
  for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, atol=1e-7)


def test_the_comparison_detects_a_changed_weight():
  """The comparison of gradients can fail: a changed weight changes the gradient."""
  want = gradient("ce", packed(ROWS, ""))
  batch = packed(ROWS, "")
  other = batch.replace(mask_BT=batch.mask_BT.at[0, 0].set(~batch.mask_BT[0, 0]))
  with pytest.raises(AssertionError):
    assert_same(gradient("ce", other), want)
