"""The training step: pure, and the same for recorded and online teachers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distill_jax import head
from distill_jax.layers import Compute
from distill_jax.losses.kd import forward_kl
from distill_jax.types import Batch, Inputs, Mean, Output, Targets, TrainState


@dataclasses.dataclass(frozen=True, eq=False)  # jit hashes it: by identity
class Step:
  """All that is static about a training step: what is minimised, and how it is computed.

  Attributes:
    losses: by name; each a dataclass with `weight` and `per_token`.
    learning_rate: of the step number.
    optimizer: all of the update but the learning rate.
    student, teacher: how each is computed.
    chunk: positions of each sequence whose logits exist at once.
    accumulate: microbatches a step; the gradient is that of the whole batch.
  """

  losses: Mapping[str, Any]
  learning_rate: Callable[[jax.Array], jax.Array]
  optimizer: optax.GradientTransformationExtraArgs
  student: Compute
  teacher: Compute
  chunk: int
  accumulate: int = 1

  def init(self, model: Any) -> TrainState:
    """The state before step 0."""
    return TrainState(jnp.zeros((), jnp.int32), model, {}, self.optimizer.init(model))

  def __call__(
    self, state: TrainState, batch: Batch, teachers: Mapping[str, Any]
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step: (state, batch, online teachers by name) -> (state, metrics as scalars).

    Losses are sums over tokens divided by the token count of the whole batch, so neither
    microbatches nor the mesh change the gradient.
    """
    count = jnp.maximum(jnp.sum(batch.mask_BT, dtype=jnp.float32), 1.0)
    grad = jax.value_and_grad(self._loss, has_aux=True)

    def micro(piece: Batch):
      return grad(state.params, piece, teachers, state.step, count)

    if self.accumulate == 1:
      (loss, means), grads = micro(batch)
    else:
      pieces = jax.tree.map(self._microbatches, batch)
      zero = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype),
        jax.eval_shape(micro, jax.tree.map(lambda x: x[0], pieces)),
      )
      add = lambda total, piece: (jax.tree.map(jnp.add, total, micro(piece)), None)
      ((loss, means), grads), _ = jax.lax.scan(add, zero, pieces)

    with jax.named_scope("update"):
      rate = self.learning_rate(state.step)
      updates, opt = self.optimizer.update(grads, state.opt, state.params, value=loss)
      updates = jax.tree.map(lambda u: -rate * u, updates)
      new = TrainState(
        state.step + 1, optax.apply_updates(state.params, updates), state.adapters, opt
      )
    metrics = {"loss": loss, "learning_rate": rate, "grad_norm": optax.tree.norm(grads)}
    metrics |= {name: mean.value() for name, mean in means.items()}
    for name, fn in self.losses.items():
      metrics[f"weight/{name}"] = fn.weight(state.step)
    return new, metrics | {"tokens": count}

  def _loss(self, model: Any, batch: Batch, teachers: Mapping[str, Any], step, count):
    out: Output = model(batch.inputs, self.student)
    batch = batch.replace(targets={**batch.targets, **self._online(teachers, batch.inputs)})

    def chunk_loss(logits_BCV: jax.Array, piece: Batch):
      total, means = jnp.zeros((), jnp.float32), {}
      for name, fn in self.losses.items():
        means[name] = Mean.of(fn.per_token(logits_BCV, piece, step), piece.mask_BT)
        total += fn.weight(step) / count * means[name].total
      ce_BC = -head.logp_at(jax.lax.stop_gradient(logits_BCV), piece.labels_BT[..., None])[..., 0]
      means["ce"] = Mean.of(ce_BC, piece.mask_BT)
      for name, targets in piece.targets.items():
        kl_BC = jax.lax.stop_gradient(forward_kl(targets, logits_BCV))
        means[f"kl/{name}"] = Mean.of(kl_BC, piece.mask_BT)
      return total, means

    return head.loss(chunk_loss, out.hidden_BTD, out.head_VD, batch, self.chunk)

  def _online(self, teachers: Mapping[str, Any], inputs: Inputs) -> dict[str, Targets]:
    return {name: online_targets(model, inputs, self.teacher) for name, model in teachers.items()}

  def _microbatches(self, x_B: jax.Array) -> jax.Array:
    """[B, ...] -> [accumulate, B / accumulate, ...], each spread over devices as B was."""
    rows = x_B.reshape(x_B.shape[0] // self.accumulate, self.accumulate, *x_B.shape[1:])
    return jnp.moveaxis(rows, 1, 0)


def online_targets(model: Any, inputs: Inputs, how: Compute) -> Targets:
  """A teacher that runs beside the student: hidden states and head, no logits."""
  with jax.named_scope("teacher"):
    out: Output = model(inputs, how)
    return jax.lax.stop_gradient(Targets(hidden_BTD=out.hidden_BTD, head_VD=out.head_VD))


