"""The training step: pure, and the same for recorded and online teachers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from distill_jax.losses import BaseLoss, FeatureLoss, TokenLoss, count_labels, features, fused_loss
from distill_jax.losses.features import Features, FeatureSpec
from distill_jax.models.trainables import WHOLE, Trainable
from distill_jax.nn.layers import ComputeConfig
from distill_jax.training import token_metrics
from distill_jax.training.outputs import (
  Teachers,
  label_each_output,
  recorded_features,
  run_teacher,
)
from distill_jax.types import (
  Batch,
  FamilyConfig,
  Mean,
  Model,
  Output,
  PyTree,
  Recorded,
  Targets,
  TrainState,
)

Weights = dict[str, jax.Array]  # of the losses, by name
Metrics = dict[str, jax.Array]  # scalars


class Fixed(NamedTuple):
  """What a loss depends on and is not differentiated in.

  Attributes:
    teachers: the online ones.
    step: the step number.
    label_count: of the whole batch; every sum over labels is divided by it.
    base: the model that low-rank adapters are trained on.
  """

  teachers: Teachers
  step: jax.Array | int
  label_count: jax.Array | float
  base: Model | None = None


class Prepared(NamedTuple):
  """What the losses of one microbatch are computed from.

  Attributes:
    out: the student's outputs.
    batch: its labels, and every teacher's targets.
    student: the student's features; `teachers`: the teachers', by name.
  """

  out: Output
  batch: Batch
  student: Features
  teachers: dict[str, Features]


@dataclasses.dataclass(frozen=True, eq=False)  # jit hashes it: by identity
class Step:
  """Everything static about a training step: what is minimised, and how it is computed.

  Attributes:
    losses: by name; see distill_jax/losses.
    learning_rate: of the step number.
    optimizer: the whole update but for the learning rate.
    student, teacher: how each is computed.
    chunk: positions of each sequence whose logits exist at once.
    accumulate: microbatches a step; the gradient is that of the whole batch.
    vocab_size: tokens; further rows of a head are padding. None: no row is.
    student_config, teacher_config: shapes, for feature losses.
    recorded: how the targets in a batch were recorded.
    balance_every: steps between measurements of the losses' gradient norms, which are then
      held in the ratio of the losses' weights; 0: never, weights are weights.
    trainable: what of the student is trained.
    first_classes: of several tasks, each one's name and its first row of the head.
  """

  losses: Mapping[str, BaseLoss]
  learning_rate: Callable[[jax.Array], jax.Array]
  optimizer: optax.GradientTransformationExtraArgs
  student: ComputeConfig
  teacher: ComputeConfig
  chunk: int
  accumulate: int = 1
  vocab_size: int | None = None
  student_config: FamilyConfig | None = None
  teacher_config: FamilyConfig | None = None
  recorded: Recorded = Recorded()
  balance_every: int = 0
  trainable: Trainable = WHOLE
  first_classes: tuple[tuple[str, int], ...] = ()

  @functools.cached_property
  def token_losses(self) -> dict[str, TokenLoss]:
    return {name: fn for name, fn in self.losses.items() if isinstance(fn, TokenLoss)}

  @functools.cached_property
  def feature_losses(self) -> dict[str, FeatureLoss]:
    return {name: fn for name, fn in self.losses.items() if isinstance(fn, FeatureLoss)}

  @property
  def configs(self) -> tuple[FamilyConfig, FamilyConfig]:
    """The student's and the teacher's config, of a step with feature losses."""
    assert self.student_config is not None and self.teacher_config is not None
    return self.student_config, self.teacher_config

  def init(self, trained: PyTree, adapters: dict[str, PyTree] | None = None) -> TrainState:
    """The state before step 0.

    Args:
      trained: what is trained of the student: a model, its shared layers, or its adapters.
      adapters: parameters that losses own, by loss.
    """
    adapters = adapters or {}
    balance = {name: jnp.ones(()) for name in self.losses} if self.balance_every else {}
    opt = self.optimizer.init((trained, adapters))
    return TrainState(jnp.zeros((), jnp.int32), trained, adapters, opt, balance)

  def __call__(
    self, state: TrainState, batch: Batch, teachers: Teachers, base: Model | None = None
  ) -> tuple[TrainState, Metrics]:
    """One step: (state, batch, online teachers by name) -> (state, metrics as scalars).

    With a `base`, state.params are its low-rank adapters and it stays as it is.
    Losses are sums over tokens divided by the token count of the whole batch, so neither
    microbatches nor the mesh change the gradient.
    """
    count = count_labels(batch)
    fixed = Fixed(teachers, state.step, count, base)
    trained = (state.params, state.adapters)
    pieces = jax.tree.map(self._microbatches, batch)
    weights = {name: fn.weight(state.step) for name, fn in self.losses.items()}
    balance = self._balance(state, jax.tree.map(lambda x: x[0], pieces), fixed, weights)
    scaled = {name: w * balance.get(name, 1.0) for name, w in weights.items()}
    (loss, means), grads = self._gradient(trained, pieces, fixed, scaled)

    with jax.named_scope("update"):
      rate = self.learning_rate(state.step)
      updates, opt = self.optimizer.update(grads, state.opt, trained, value=loss)
      updates = jax.tree.map(lambda u: -rate * u, updates)
      new_params, adapters = optax.apply_updates(trained, updates)
    metrics = {"loss": loss, "learning_rate": rate, "grad_norm": optax.tree.norm(grads)}
    metrics |= {name: mean.value() for name, mean in means.items()}
    metrics |= {"perplexity": jnp.exp(metrics["ce"]), "tokens": count}
    metrics |= {f"weight/{name}": w for name, w in scaled.items()}
    metrics |= self._scheduled(state.step)
    return TrainState(state.step + 1, new_params, adapters, opt, balance), metrics

  def _scheduled(self, step: jax.Array) -> Metrics:
    """The losses' schedules at a step, but for their weights."""
    return {
      f"{key}/{name}": schedule(step)
      for name, fn in self.losses.items()
      for key, schedule in fn.schedules().items()
      if key != "weight"
    }

  def _gradient(
    self, trained: PyTree, pieces: Batch, fixed: Fixed, weights: Weights
  ) -> tuple[tuple[jax.Array, dict[str, Mean]], PyTree]:
    """((loss, means), gradient), summed over microbatches [accumulate, B / accumulate, ...]."""
    value_and_grad = jax.value_and_grad(self.loss, has_aux=True)

    def micro(piece: Batch) -> PyTree:
      return value_and_grad(trained, piece, fixed, weights)

    first = jax.tree.map(lambda x: x[0], pieces)
    if self.accumulate == 1:
      return micro(first)

    def add(total: PyTree, piece: Batch) -> tuple[PyTree, None]:
      return jax.tree.map(jnp.add, total, micro(piece)), None

    shapes = jax.eval_shape(micro, first)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zero, pieces)[0]

  def loss(
    self, trained: PyTree, batch: Batch, fixed: Fixed, weights: Weights
  ) -> tuple[jax.Array, dict[str, Mean]]:
    """(weighted loss, means of losses and metrics) of one microbatch.

    Args:
      trained: (what is trained of the student, adapters of losses), to differentiate in.
    """
    trained_params, adapters = trained
    model = self.trainable.model(trained_params, fixed.base)
    prepared = self._prepare(model, batch, fixed.teachers)
    total, means = self._token_losses(prepared, fixed, weights)
    for name, fn in self.feature_losses.items():
      with jax.named_scope(name):
        means[name] = fn.feature_loss(
          prepared.student,
          prepared.teachers[fn.teacher],
          adapters.get(name, {}),
          prepared.batch,
          self.pairs(fn),
        )
        total += weights[name] / fixed.label_count * means[name].total
    return total, means

  def _prepare(self, model: Model, batch: Batch, teachers: Teachers) -> Prepared:
    """Runs the student and its online teachers, and reads the recorded ones."""
    ours, theirs = self.feature_specs()
    out = model(batch.model_inputs, self.student, ours.taps)
    targets, teacher_features = self._teacher_outputs(batch, teachers, theirs)
    labelled = batch.with_contrastive_labels() if out.contrastive else batch
    student = ours.extract(model, out, batch.model_inputs, self.student)
    return Prepared(out, labelled.replace(targets=targets), student, teacher_features)

  def _token_losses(
    self, prepared: Prepared, fixed: Fixed, weights: Weights
  ) -> tuple[jax.Array, dict[str, Mean]]:
    """(weighted sum of the token losses, means of losses and metrics)."""
    out = prepared.out
    return fused_loss(
      self.token_losses,
      out.hidden_BTD,
      out.head_VD,
      label_each_output(prepared.batch, out),
      step=fixed.step,
      label_count=fixed.label_count,
      chunk=self.chunk,
      vocab_size=self.vocab_size,
      soft_cap=out.soft_cap,
      weights=weights,
      metrics=functools.partial(token_metrics.means, first_classes=self.first_classes),
    )

  def fit(
    self, trained: PyTree, batch: Batch, teachers: Teachers, base: Model | None = None
  ) -> dict[str, PyTree]:
    """The adapters of those losses that fit theirs on one batch, fitted.

    Args:
      trained: (what is trained of the student, adapters of losses), as in `loss`.
    """
    trained_params, adapters = trained
    model = self.trainable.model(trained_params, base)
    prepared = self._prepare(model, batch, teachers)
    return {
      name: fn.fit(
        adapters[name],
        self.pairs(fn),
        prepared.student,
        prepared.teachers[fn.teacher],
        batch,
      )
      for name, fn in self.feature_losses.items()
      if fn.fits_adapters and name in adapters
    }

  def pairs(self, fn: FeatureLoss) -> features.Pairs:
    """The (student layer, teacher layer) pairs of a feature loss."""
    return fn.pairs(*self.configs)

  def feature_specs(self) -> tuple[FeatureSpec, FeatureSpec]:
    """The features that the losses compare, of the student and of the teacher."""
    ours, theirs = FeatureSpec(), FeatureSpec()
    for fn in self.feature_losses.values():
      a, b = fn.feature_specs(self.pairs(fn), *self.configs)
      ours, theirs = ours | a, theirs | b
    return ours, theirs

  def _teacher_outputs(
    self, batch: Batch, teachers: Teachers, spec: FeatureSpec
  ) -> tuple[dict[str, Targets], dict[str, Features]]:
    """Targets and features of every teacher, from its records or from its model."""
    targets, teacher_features = dict(batch.targets), {}
    for name, t in targets.items():
      if t.taps_BPTD is not None:
        teacher_features[name] = recorded_features(t.taps_BPTD, self.recorded, self.teacher_config)
        targets[name] = t.replace(taps_BPTD=None)
    for name, model in teachers.items():
      inputs = batch.model_inputs
      targets[name], teacher_features[name] = run_teacher(model, inputs, self.teacher, spec)
    return targets, teacher_features

  def _balance(
    self, state: TrainState, batch: Batch, fixed: Fixed, weights: Weights
  ) -> dict[str, jax.Array]:
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
      grad = jax.grad(self.loss, has_aux=True)
      grads, _ = grad((state.params, state.adapters), batch, fixed, alone)
      return optax.tree.norm(grads)

    def measure() -> dict[str, jax.Array]:
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
