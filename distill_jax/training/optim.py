"""AdamW with gradient clipping, decoupled weight decay and a learning-rate schedule."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from distill_jax.errors import bad_value, check_choice
from distill_jax.nn import params
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
    InputError: The schedule is unknown, or the warm-up is not shorter than the training.
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
    schedule = optax.linear_schedule(peak, end, fall, max(0, rest - fall))
  return optax.join_schedules([warmup, schedule], [c.warmup_steps])


def decay_mask(tree: PyTree) -> PyTree:
  """Returns a tree with True for parameters that decay: matrices, but not norms or biases."""

  def mask(v: PyTree) -> PyTree:
    axes = v.get_metadata()["axes"] if params.is_param(v) else v.shape
    wide = sum(a not in ("layers", "encoder_layers", "experts", "one") for a in axes) > 1
    return jax.tree.map(lambda _: wide and "bias" not in axes, v)

  return params.map_params(mask, tree)


def optimizer(c: OptimOptions) -> optax.GradientTransformationExtraArgs:
  """Returns the optimizer without the learning rate, which the step applies and logs.

  `update` takes `value=` (the loss) for reduce-on-plateau.
  """
  transforms = [
    optax.clip_by_global_norm(c.clip_norm),
    optax.scale_by_adam(c.b1, c.b2, c.eps, mu_dtype=jnp.float32),
    optax.add_decayed_weights(c.weight_decay, mask=decay_mask),
  ]
  if c.plateau_patience:
    transforms.append(optax.contrib.reduce_on_plateau(factor=0.5, patience=c.plateau_patience))
  return optax.with_extra_args_support(optax.chain(*transforms))
