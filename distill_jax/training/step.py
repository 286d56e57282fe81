"""The training step: a pure function, the same for recorded and online teachers."""

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
from distill_jax.nn import params, sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.records.student_rows import TEACHER
from distill_jax.training import token_metrics
from distill_jax.training.optim import plateau_scale
from distill_jax.training.outputs import Teachers, all_teacher_outputs, label_each_output
from distill_jax.training.train_state import TrainState
from distill_jax.types import (
  Batch,
  FamilyConfig,
  Mean,
  Model,
  Output,
  PyTree,
  Recorded,
)

Weights = dict[str, jax.Array]  # weights of the losses, by name
Metrics = dict[str, jax.Array]  # scalars


class Fixed(NamedTuple):
  """Arguments of the loss that are constants in the gradient.

  Attributes:
    teachers: The online teachers, by name.
    step: The step number.
    label_count: Number of labels of the whole batch, by which sums over labels are divided.
    base: The base model of low-rank adapters, or None.
    frozen: The student's frozen parameters (see `params.split`), or None.
  """

  teachers: Teachers
  step: jax.Array | int
  label_count: jax.Array | float
  base: Model | None = None
  frozen: PyTree = None


class Prepared(NamedTuple):
  """Inputs of the losses for one microbatch.

  Attributes:
    out: The student's outputs.
    batch: The labels, and the targets of all teachers.
    student: The student's features.
    teachers: The teachers' features, by name.
  """

  out: Output
  batch: Batch
  student: Features
  teachers: dict[str, Features]


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, as jit needs
class Step:
  """A training step, with everything that is static under jit.

  Attributes:
    losses: The losses, by name; see distill_jax/losses.
    learning_rate: Learning rate as a function of the step number.
    optimizer: The optimizer without the learning rate.
    student: The student's compute config.
    teacher: The teachers' compute config.
    chunk: Number of positions per sequence whose logits are in memory at once.
    longest: Length of sequences with such chunks; batches of shorter ones have shorter chunks.
    accumulate: Number of microbatches per step. The gradient is that of the whole batch.
    vocab_size: Number of tokens; further rows of the head are padding. None if no row is padding.
    student_config: The student's architecture config, for feature losses.
    teacher_configs: Architecture configs of the teachers of feature losses, by name.
    recorded: Metadata of the recorded targets in a batch.
    balance_every: Number of steps between re-balancings of the losses; 0 for never. See `_balance`.
    trainable: The part of the student that is trained.
    first_classes: Name and first row of the head of each task, if there are several.
  """

  losses: Mapping[str, BaseLoss]
  learning_rate: Callable[[jax.Array], jax.Array]
  optimizer: optax.GradientTransformationExtraArgs
  student: ComputeConfig
  teacher: ComputeConfig
  chunk: int
  longest: int | None = None
  accumulate: int = 1
  vocab_size: int | None = None
  student_config: FamilyConfig | None = None
  teacher_configs: Mapping[str, FamilyConfig] = dataclasses.field(default_factory=dict)
  recorded: Recorded = Recorded()
  balance_every: int = 0
  trainable: Trainable = WHOLE
  first_classes: tuple[tuple[str, int], ...] = ()

  @functools.cached_property
  def token_losses(self) -> dict[str, TokenLoss]:
    """The losses that are computed from logits, by name."""
    return {name: fn for name, fn in self.losses.items() if isinstance(fn, TokenLoss)}

  @functools.cached_property
  def feature_losses(self) -> dict[str, FeatureLoss]:
    """The losses that are computed from features, by name."""
    return {name: fn for name, fn in self.losses.items() if isinstance(fn, FeatureLoss)}

  def configs(self, fn: FeatureLoss) -> tuple[FamilyConfig, FamilyConfig]:
    """Returns the architecture configs of the student and of a feature loss's teacher."""
    assert self.student_config is not None
    return self.student_config, self.teacher_configs[fn.teacher]

  def init(self, trained: PyTree, adapters: dict[str, PyTree] | None = None) -> TrainState:
    """Returns the state before step 0.

    Args:
      trained: The `params` of the state: a model, its shared layers, or its low-rank adapters.
      adapters: Adapters of the losses, by the name of the loss.
    """
    adapters = adapters or {}
    balance = {name: jnp.ones(()) for name in self.losses} if self.balance_every else {}
    free, _ = params.split(trained, self.trainable.frozen)
    opt = self.optimizer.init((free, adapters))
    return TrainState(jnp.zeros((), jnp.int32), trained, adapters, opt, balance)

  def __call__(
    self, state: TrainState, batch: Batch, teachers: Teachers, base: Model | None = None
  ) -> tuple[TrainState, Metrics]:
    """Runs one training step.

    Losses are sums over tokens divided by the token count of the whole batch. Neither microbatches
    nor the mesh change the gradient.

    Args:
      state: The training state.
      batch: The global batch.
      teachers: The online teachers, by name.
      base: The frozen base model if state.params are low-rank adapters; otherwise None.

    Returns:
      The new state, and scalar metrics by name.
    """
    count = count_labels(batch)
    free, frozen = params.split(state.params, self.trainable.frozen)
    fixed = Fixed(teachers, state.step, count, base, frozen)
    differentiated = (free, state.adapters)
    pieces = jax.tree.map(self.microbatches, batch)
    weights = {name: fn.weight(state.step) for name, fn in self.losses.items()}
    first = jax.tree.map(lambda x: x[0], pieces)
    balance = self._balance(state, differentiated, first, fixed, weights)
    scaled = {name: w * balance.get(name, 1.0) for name, w in weights.items()}
    (loss, means), grads = self._gradient(differentiated, pieces, fixed, scaled)
    with jax.named_scope("update"):
      rate = self.learning_rate(state.step)
      updates, opt = self.optimizer.update(grads, state.opt, differentiated, value=loss)
      updates = jax.tree.map(lambda u: -rate * u, updates)
      updated, adapters = optax.apply_updates(differentiated, updates)
      new_params = params.join(updated, frozen)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    metrics["learning_rate"] = rate * plateau_scale(opt)
    metrics |= {name: mean.value() for name, mean in means.items()}
    metrics |= {"perplexity": jnp.exp(metrics["ce"]), "tokens": count}
    metrics |= {f"weight/{name}": w for name, w in scaled.items()}
    metrics |= self._scheduled(state.step)
    return TrainState(state.step + 1, new_params, adapters, opt, balance), metrics

  def _scheduled(self, step: jax.Array) -> Metrics:
    """Returns the values of the losses' schedules at a step, except weights."""
    return {
      f"{key}/{name}": schedule(step)
      for name, fn in self.losses.items()
      for key, schedule in fn.schedules().items()
      if key != "weight"
    }

  def _gradient(
    self, differentiated: PyTree, pieces: Batch, fixed: Fixed, weights: Weights
  ) -> tuple[tuple[jax.Array, dict[str, Mean]], PyTree]:
    """Returns ((loss, means), gradient), summed over microbatches [accumulate, B / accumulate].

    Gradients of parameters in bfloat16 are summed and returned in float32.
    """
    value_and_grad = jax.value_and_grad(self.loss, has_aux=True)

    def micro(piece: Batch) -> PyTree:
      made = value_and_grad(differentiated, piece, fixed, weights)
      return jax.tree.map(lambda x: x.astype(jnp.float32), made)

    first = jax.tree.map(lambda x: x[0], pieces)
    if self.accumulate == 1:
      return micro(first)

    def add(total: PyTree, piece: Batch) -> tuple[PyTree, None]:
      return jax.tree.map(jnp.add, total, micro(piece)), None

    zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(micro, first))
    return jax.lax.scan(add, zero, pieces)[0]

  def loss(
    self, differentiated: PyTree, batch: Batch, fixed: Fixed, weights: Weights
  ) -> tuple[jax.Array, dict[str, Mean]]:
    """Returns (weighted loss, means of losses and metrics) of one microbatch.

    Args:
      differentiated: (the student's parameters that are not frozen, adapters of the losses).
      batch: The microbatch.
      fixed: The other arguments, constants in the gradient.
      weights: Weights of the losses, by name.
    """
    free, adapters = differentiated
    model = self.trainable.model(params.join(free, fixed.frozen), fixed.base)
    prepared = self.prepare(model, batch, fixed.teachers)
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

  def prepare(self, model: Model, batch: Batch, teachers: Teachers) -> Prepared:
    """Runs the student and the online teachers, and reads the recorded ones."""
    ours, theirs = self.feature_specs()
    out = model(batch.model_inputs, self.student, ours.taps)
    targets, teacher_features = all_teacher_outputs(
      batch, teachers, self.teacher, theirs, self.recorded, self.teacher_configs.get(TEACHER)
    )
    labelled = batch.with_contrastive_labels() if out.contrastive else batch
    student = ours.extract(model, out, batch.model_inputs, self.student)
    return Prepared(out, labelled.replace(targets=targets), student, teacher_features)

  def _token_losses(
    self, prepared: Prepared, fixed: Fixed, weights: Weights
  ) -> tuple[jax.Array, dict[str, Mean]]:
    """Returns (weighted sum of the token losses, means of losses and metrics)."""
    out, T = prepared.out, prepared.batch.mask_BT.shape[1]
    return fused_loss(
      self.token_losses,
      out.hidden_BTD,
      out.head_VD,
      label_each_output(prepared.batch, out),
      step=fixed.step,
      label_count=fixed.label_count,
      chunk=max(1, self.chunk * T // (self.longest or T)),
      vocab_size=self.vocab_size,
      soft_cap=out.soft_cap,
      weights=weights,
      seq_axis=sharding.SEQ,
      embed_axis=self.student.rules.spec(("embed",), "storage")[0],
      metrics=functools.partial(token_metrics.means, first_classes=self.first_classes),
    )

  def fit(
    self,
    trained: PyTree,
    adapters: dict[str, PyTree],
    batch: Batch,
    teachers: Teachers,
    base: Model | None = None,
  ) -> dict[str, PyTree]:
    """Returns adapters of losses that are fitted to a first batch, by the name of the loss.

    Args:
      trained: See `init`.
      adapters: See `init`.
      batch: The batch.
      teachers: The online teachers, by name.
      base: The base model of low-rank adapters, or None.
    """
    model = self.trainable.model(trained, base)
    prepared = self.prepare(model, batch, teachers)
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
    """Returns the (student layer, teacher layer) pairs of a feature loss."""
    return fn.pairs(*self.configs(fn))

  def feature_specs(self) -> tuple[FeatureSpec, dict[str, FeatureSpec]]:
    """Returns specs of the features that the losses compare: the student's, and each teacher's."""
    ours, theirs = FeatureSpec(), dict[str, FeatureSpec]()
    for fn in self.feature_losses.values():
      a, b = fn.feature_specs(self.pairs(fn), *self.configs(fn))
      ours, theirs[fn.teacher] = ours | a, theirs.get(fn.teacher, FeatureSpec()) | b
    return ours, theirs

  def _balance(
    self, state: TrainState, differentiated: PyTree, batch: Batch, fixed: Fixed, weights: Weights
  ) -> dict[str, jax.Array]:
    """Returns factors that bring the losses' gradient norms into the ratio of their weights.

    Every `balance_every` steps the gradient of each loss is computed on the first microbatch. The
    factors preserve the mean norm, so that the learning rate keeps its scale. This is the idea of
    GradNorm (arXiv:1711.02257), solved in closed form instead of trained.
    """
    if not self.balance_every:
      return state.balance
    names = list(self.losses)

    def norm(one_hot: jax.Array) -> jax.Array:
      alone = dict(zip(names, one_hot, strict=True))
      grad = jax.grad(self.loss, has_aux=True)
      grads, _ = grad(differentiated, batch, fixed, alone)
      return optax.tree.norm(grads)

    def measure() -> dict[str, jax.Array]:
      norms = jax.lax.map(norm, jnp.eye(len(names)))
      w = jnp.stack([weights[name] for name in names])
      mean = jnp.sum(w * norms) / jnp.maximum(jnp.sum(w), 1e-9)
      factors = jnp.where(norms > 0, mean / jnp.where(norms > 0, norms, 1), 1)
      return dict(zip(names, factors, strict=True))

    return jax.lax.cond(state.step % self.balance_every == 0, measure, lambda: state.balance)

  def microbatches(self, x_B: jax.Array) -> jax.Array:
    """Reshapes [B, ...] to [accumulate, B / accumulate, ...], with the sharding of B in each."""
    rows = x_B.reshape(x_B.shape[0] // self.accumulate, self.accumulate, *x_B.shape[1:])
    return jnp.moveaxis(rows, 1, 0)
