"""The training step: pure, and the same for recorded and online teachers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distill_jax.losses import features
from distill_jax.losses.features import Features, FeatureSpec
from distill_jax.nn import fused_head, layer_sharing, lora, params
from distill_jax.nn.layers import ComputeConfig
from distill_jax.training import token_metrics
from distill_jax.types import Batch, Inputs, Mean, Output, Recorded, Targets, TrainState

NOTHING = FeatureSpec()
Teachers = Mapping[str, Any]  # online teachers by name
Weights = dict[str, jax.Array]  # of the losses, by name


@dataclasses.dataclass(frozen=True, eq=False)  # jit hashes it: by identity
class Step:
  """All that is static about a training step: what is minimised, and how it is computed.

  Attributes:
    losses: by name; see distill_jax/losses.
    learning_rate: of the step number.
    optimizer: all of the update but the learning rate.
    student, teacher: how each is computed.
    chunk: positions of each sequence whose logits exist at once.
    accumulate: microbatches a step; the gradient is that of the whole batch.
    vocab_size: tokens; further rows of a head are padding. None: no row is.
    student_config, teacher_config: shapes, for whole-sequence losses.
    recorded: what the targets in a batch are.
    balance_every: steps between measurements of the losses' gradient norms, which are then
      held in the ratio of the losses' weights; 0: never, weights are weights.
    frozen: see params.trainable_mask.
    parts: of several tasks, each one's name and its first row of the head.
  """

  losses: Mapping[str, Any]
  learning_rate: Callable[[jax.Array], jax.Array]
  optimizer: optax.GradientTransformationExtraArgs
  student: ComputeConfig
  teacher: ComputeConfig
  chunk: int
  accumulate: int = 1
  vocab_size: int | None = None
  student_config: Any = None
  teacher_config: Any = None
  recorded: Recorded = Recorded()
  balance_every: int = 0
  frozen: tuple[str, ...] = ()
  parts: tuple[tuple[str, int], ...] = ()

  def init(self, model: Any, adapters: dict[str, Any] | None = None) -> TrainState:
    """The state before step 0, of what is trained: a model, its shared layers, or adapters."""
    adapters = adapters or {}
    balance = {name: jnp.ones(()) for name in self.losses} if self.balance_every else {}
    opt = self.optimizer.init((model, adapters))
    return TrainState(jnp.zeros((), jnp.int32), model, adapters, opt, balance)

  def __call__(
    self, state: TrainState, batch: Batch, teachers: Teachers, base: Any = None
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step: (state, batch, online teachers by name) -> (state, metrics as scalars).

    With a `base`, state.params are its low-rank adapters and it stays as it is.
    Losses are sums over tokens divided by the token count of the whole batch, so neither
    microbatches nor the mesh change the gradient.
    """
    count = jnp.maximum(jnp.sum(batch.mask_BT, dtype=jnp.float32), 1.0)
    trained = (state.params, state.adapters)
    pieces = jax.tree.map(self._microbatches, batch)
    first = jax.tree.map(lambda x: x[0], pieces)
    grad = jax.value_and_grad(self._loss, has_aux=True)
    weights = {name: fn.weight(state.step) for name, fn in self.losses.items()}
    balance = self._balance(state, trained, first, teachers, weights, count, base)
    scaled = {name: w * balance.get(name, 1.0) for name, w in weights.items()}

    def micro(piece: Batch):
      return grad(trained, piece, teachers, state.step, count, scaled, base)

    if self.accumulate == 1:
      (loss, means), grads = micro(first)
    else:
      shapes = jax.eval_shape(micro, first)
      zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
      add = lambda total, piece: (jax.tree.map(jnp.add, total, micro(piece)), None)
      ((loss, means), grads), _ = jax.lax.scan(add, zero, pieces)

    with jax.named_scope("update"):
      rate = self.learning_rate(state.step)
      updates, opt = self.optimizer.update(grads, state.opt, trained, value=loss)
      updates = jax.tree.map(lambda u: -rate * u, updates)
      model, adapters = optax.apply_updates(trained, updates)
    metrics = {"loss": loss, "learning_rate": rate, "grad_norm": optax.tree.norm(grads)}
    metrics |= {name: mean.value() for name, mean in means.items()}
    metrics |= {"perplexity": jnp.exp(metrics["ce"]), "tokens": count}
    metrics |= {f"weight/{name}": w for name, w in scaled.items()}
    metrics |= {
      f"temperature/{name}": fn.temperature(state.step)
      for name, fn in self.losses.items()
      if hasattr(fn, "temperature")
    }
    return TrainState(state.step + 1, model, adapters, opt, balance), metrics

  def _loss(
    self,
    trained: Any,
    batch: Batch,
    teachers: Teachers,
    step: Any,
    count: Any,
    weights: Weights,
    base: Any = None,
  ) -> tuple[jax.Array, dict[str, Mean]]:
    model, adapters = trained
    if self.frozen:
      still = lambda x, trains: x if trains else jax.lax.stop_gradient(x)
      model = jax.tree.map(still, model, params.trainable_mask(model, self.frozen))
    model = _student(model, base)
    ours, theirs = self.needs()
    out: Output = model(batch.inputs, self.student, ours.taps)
    targets, taught = self._taught(batch, teachers, theirs)
    batch = (batch.with_contrastive_labels() if out.contrastive else batch).replace(targets=targets)

    def chunk_loss(logits_BCV: jax.Array, piece: Batch):
      logits_BCV = fused_head.only_rows(
        fused_head.soft_cap(logits_BCV, out.soft_cap), piece.class_range_BT2
      )
      total, means = jnp.zeros((), jnp.float32), {}
      for name, fn in self.losses.items():
        if hasattr(fn, "token_loss"):
          taught = hasattr(fn, "teacher") or hasattr(fn, "teachers")
          mask_BC = piece.mask_for_teacher_losses() if taught else piece.mask_for_label_losses()
          means[name] = Mean.of(fn.token_loss(logits_BCV, piece, step), mask_BC)
          total += weights[name] / count * means[name].total
      fixed = jax.lax.stop_gradient(logits_BCV)
      return total, means | token_metrics.means(fixed, piece, self.recorded, self.parts)

    total, means = fused_head.loss(
      chunk_loss, out.hidden_BTD, out.head_VD, _answers(batch, out), self.chunk, self.vocab_size
    )
    mine = ours.of(model, out, batch.inputs, self.student)
    for name, fn in self.losses.items():
      if hasattr(fn, "whole"):
        with jax.named_scope(name):
          own = adapters.get(name, {})
          means[name] = fn.whole(mine, taught[fn.teacher], own, batch, self.pairs(fn))
          total += weights[name] / count * means[name].total
    return total, means

  def fit(
    self,
    names: list[str],
    model: Any,
    adapters: dict[str, Any],
    batch: Batch,
    teachers: Teachers,
    base: Any = None,
  ) -> dict[str, Any]:
    """The adapters of these losses as their losses fit them on one batch."""
    model = _student(model, base)
    ours, theirs = self.needs()
    out: Output = model(batch.inputs, self.student, ours.taps)
    mine = ours.of(model, out, batch.inputs, self.student)
    _, taught = self._taught(batch, teachers, theirs)
    fitted = {}
    for name in names:
      fn = self.losses[name]
      fitted[name] = fn.fit(adapters[name], self.pairs(fn), mine, taught[fn.teacher], batch)
    return fitted

  def pairs(self, fn: Any) -> features.Pairs:
    """The (student layer, teacher layer) pairs of a whole-sequence loss."""
    ours, theirs = self.student_config, self.teacher_config
    return features.pairs(fn.layers, ours.num_hidden_layers, theirs.num_hidden_layers)

  def needs(self) -> tuple[FeatureSpec, FeatureSpec]:
    """The features that the losses compare, of the student and of the teacher."""
    ours, theirs = FeatureSpec(), FeatureSpec()
    for fn in self.losses.values():
      if hasattr(fn, "needs"):
        a, b = fn.needs(self.pairs(fn), self.student_config, self.teacher_config)
        ours, theirs = ours | a, theirs | b
    return ours, theirs

  def _taught(
    self, batch: Batch, teachers: Teachers, needs: FeatureSpec
  ) -> tuple[dict[str, Targets], dict[str, Features]]:
    """Targets and features of every teacher, from its records or from itself."""
    targets, taught = dict(batch.targets), {}
    for name, t in targets.items():
      if t.taps_BPTD is not None:
        taught[name] = self._recorded_features(t.taps_BPTD)
        targets[name] = t.replace(taps_BPTD=None)
    for name, model in teachers.items():
      targets[name], taught[name] = online(model, batch.inputs, self.teacher, needs)
    return targets, taught

  def _recorded_features(self, taps_BPTD: jax.Array) -> Features:
    by_layer = {layer: taps_BPTD[:, i] for i, layer in enumerate(self.recorded.taps)}
    if self.recorded.taps_of == "hidden":
      return Features(by_layer, {})
    split = functools.partial(features.unflat_qkv, config=self.teacher_config)
    return Features({}, {layer: split(x) for layer, x in by_layer.items()})

  def _balance(self, state, trained, batch, teachers, weights, count, base) -> dict[str, jax.Array]:
    """Factors that hold the losses' gradient norms in the ratio of their weights.

    Every `balance_every` steps each loss is pulled back alone on the first microbatch; the
    factors keep the mean norm, so that the learning rate means what it did. The idea of
    GradNorm (arXiv:1711.02257), solved at once instead of learned.
    """
    if not self.balance_every:
      return state.balance
    names = list(self.losses)

    def norm(one_hot: jax.Array) -> jax.Array:
      alone = dict(zip(names, one_hot, strict=True))
      grad = jax.grad(self._loss, has_aux=True)
      grads = grad(trained, batch, teachers, state.step, count, alone, base)
      return optax.tree.norm(grads[0])

    def measure():
      norms = jax.lax.map(norm, jnp.eye(len(names)))
      w = jnp.stack([weights[name] for name in names])
      mean = jnp.sum(w * norms) / jnp.maximum(jnp.sum(w), 1e-9)
      factors = jnp.where(norms > 0, mean / jnp.where(norms > 0, norms, 1), 1)
      return dict(zip(names, factors, strict=True))

    return jax.lax.cond(state.step % self.balance_every == 0, measure, lambda: state.balance)

  def _microbatches(self, x_B: jax.Array) -> jax.Array:
    """[B, ...] -> [accumulate, B / accumulate, ...], each spread over devices as B was."""
    rows = x_B.reshape(x_B.shape[0] // self.accumulate, self.accumulate, *x_B.shape[1:])
    return jnp.moveaxis(rows, 1, 0)


def _answers(batch: Batch, out: Output) -> Batch:
  """The batch as a student's answers see it, which may be two to a label (models/deit.py).

  Of the two, the first is held to labels and the second to teachers.
  """
  T = batch.labels_BT.shape[1]
  if out.hidden_BTD.shape[1] == T:
    return batch
  twice = lambda tree: jax.tree.map(lambda x_BT: jnp.repeat(x_BT, 2, axis=1), tree)
  heads = {name: t.head_VD for name, t in batch.targets.items()}
  bare = {name: t.replace(head_VD=None) for name, t in batch.targets.items()}
  targets = {name: t.replace(head_VD=heads[name]) for name, t in twice(bare).items()}
  second_BT = jnp.broadcast_to(jnp.arange(2 * T)[None] % 2 == 1, (len(batch.labels_BT), 2 * T))
  said = twice(batch.replace(inputs=None, valid_BS=None, targets={}))
  return said.replace(targets=targets, distill_token_BT=second_BT)


def _student(trained: Any, base: Any) -> Any:
  """The model that is computed, from what is trained."""
  if isinstance(trained, layer_sharing.Shared):
    return trained.with_adapters()
  return trained if base is None else lora.with_adapters(base, trained)


def online(
  model: Any, inputs: Inputs, compute: ComputeConfig, needs: FeatureSpec = NOTHING
) -> tuple[Targets, Features]:
  """A teacher that runs beside the student: hidden states, head, features; no logits."""
  with jax.named_scope("teacher"):
    out: Output = model(inputs, compute, needs.taps)
    said = Targets(
      hidden_BTD=out.hidden_BTD,
      head_VD=out.head_VD,
      soft_cap=out.soft_cap,
      contrastive=out.contrastive,
    )
    return jax.lax.stop_gradient((said, needs.of(model, out, inputs, compute)))
