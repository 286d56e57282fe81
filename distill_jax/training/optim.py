"""AdamW with gradient clipping, decoupled weight decay and a learning-rate schedule."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax.errors import bad_value, check_choice
from distill_jax.nn import params
from distill_jax.runtime import distributed
from distill_jax.training.options import OptimOptions
from distill_jax.types import PyTree

SCHEDULES = ("cosine", "linear", "constant", "wsd")


def learning_rate(c: OptimOptions, steps: int) -> optax.Schedule:
  """Returns the learning rate as a function of the step: linear warm-up, then a schedule.

  The rate of step 0 is peak / (warmup_steps + 1), not 0. "wsd" (warm-up, stable, decay,
  arXiv:2404.06395) stays at the peak and falls linearly over the last `decay_fraction` of the
  steps.

  Args:
    c: The optimizer's options.
    steps: Number of training steps.

  Raises:
    InputError: The schedule is unknown, or the warm-up and the decay do not fit into the training.
  """
  check_choice("optim.schedule", c.schedule, SCHEDULES, "Correct it")
  if not 0 <= c.warmup_steps < steps:
    expected = f"at least 0 and below train.steps ({steps})"
    raise bad_value("optim.warmup_steps", c.warmup_steps, expected, "Correct it")
  peak, end, rest = c.peak_lr, c.peak_lr * c.end_fraction, steps - c.warmup_steps
  warmup = optax.linear_schedule(peak / (c.warmup_steps + 1), peak, c.warmup_steps)
  if c.schedule == "cosine":
    schedule = optax.cosine_decay_schedule(peak, rest, c.end_fraction)
  elif c.schedule == "linear":
    schedule = optax.linear_schedule(peak, end, rest)
  elif c.schedule == "constant":
    schedule = optax.constant_schedule(peak)
  else:
    fall = max(1, round(c.decay_fraction * steps))
    if fall > rest:
      expected = f"at most {rest / steps:g}, the fraction of the steps after optim.warmup_steps"
      raise bad_value("optim.decay_fraction", c.decay_fraction, expected, "Lower it")
    schedule = optax.linear_schedule(peak, end, fall, rest - fall)
  return optax.join_schedules([warmup, schedule], [c.warmup_steps])


def decay_mask(tree: PyTree) -> PyTree:
  """Returns a tree with True for parameters that decay: matrices, but not norms or biases."""

  def mask(v: PyTree) -> PyTree:
    axes = v.get_metadata()["axes"] if params.is_param(v) else v.shape
    wide = sum(a not in (*params.LAYERS, "experts", "one") for a in axes) > 1
    return jax.tree.map(lambda _: wide and "bias" not in axes, v)

  return params.map_params(mask, tree)


def _with_float32_state(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """Returns a transformation whose state is in float32, as moments need; gradients are as well.

  The second moment falls by 1 - b2 per step at most, which bfloat16 rounds to nothing.
  """

  def init(tree: PyTree) -> optax.OptState:
    return inner.init(jax.tree.map(lambda x: x.astype(jnp.float32), tree))

  return optax.GradientTransformation(init, inner.update)


def optimizer(c: OptimOptions) -> optax.GradientTransformationExtraArgs:
  """Returns the optimizer without the learning rate, which the step applies and logs.

  `update` takes `value=` (the loss) for reduce-on-plateau, unless that follows a held-out metric
  (`observe`).
  """
  transforms = [
    optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity(),
    _with_float32_state(optax.scale_by_adam(c.b1, c.b2, c.eps)),
    optax.add_decayed_weights(c.weight_decay, mask=decay_mask),
  ]
  if c.plateau_patience:
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=c.plateau_patience)
    transforms.append(_at_evaluations(plateau) if c.plateau_metric else plateau)
  return optax.with_extra_args_support(optax.chain(*transforms))


def plateau_scale(opt: optax.OptState) -> jax.Array | float:
  """Returns the factor by which reduce-on-plateau lowers the rate; 1 without it.

  Args:
    opt: The optimizer's state after the update.
  """

  def is_plateau(node: PyTree) -> bool:
    return isinstance(node, optax.contrib.ReduceLROnPlateauState)

  scales = [n.scale for n in jax.tree.leaves(opt, is_leaf=is_plateau) if is_plateau(n)]
  return scales[0] if scales else 1.0


class HeldoutPlateau(NamedTuple):
  """State of reduce-on-plateau that follows a held-out metric.

  Attributes:
    plateau: The state of reduce-on-plateau.
    heldout_value: Value of an evaluation that no step has seen yet, else NaN.
  """

  plateau: optax.contrib.ReduceLROnPlateauState
  heldout_value: jax.Array


def _at_evaluations(
  plateau: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
  """Returns reduce-on-plateau that counts evaluations instead of steps."""

  def init(tree: PyTree) -> HeldoutPlateau:
    return HeldoutPlateau(plateau.init(tree), jnp.full((), jnp.nan, jnp.float32))

  def update(
    updates: PyTree, state: HeldoutPlateau, tree: PyTree = None, **_: object
  ) -> tuple[PyTree, HeldoutPlateau]:
    del tree
    _, after = plateau.update({}, state.plateau, value=state.heldout_value)
    is_new = ~jnp.isnan(state.heldout_value)
    now = jax.tree.map(lambda a, b: jnp.where(is_new, a, b), after, state.plateau)
    scaled = jax.tree.map(lambda g: now.scale * g, updates)
    return scaled, HeldoutPlateau(now, jnp.full_like(state.heldout_value, jnp.nan))

  return optax.GradientTransformationExtraArgs(init, update)


def observe(opt: optax.OptState, value: float) -> optax.OptState:
  """Returns the optimizer's state with the value of a held-out metric for the next step."""

  def seen(node: PyTree) -> PyTree:
    if not isinstance(node, HeldoutPlateau):
      return node
    of_host = distributed.from_host(np.asarray(value, np.float32), node.heldout_value.sharding)
    return node._replace(heldout_value=of_host)

  return jax.tree.map(seen, opt, is_leaf=lambda node: isinstance(node, HeldoutPlateau))
