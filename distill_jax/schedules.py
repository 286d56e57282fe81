"""Schedules: values by step number, for weights and temperatures of losses."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from distill_jax.errors import InputError

SHAPES = ("linear", "cosine", "step")


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A value by step: (step, value) points, and the shape of the way between two of them.

  One point is a constant; two are linear or cosine; more are piecewise; a first value of 0
  held to a later point is a delay. Before the first point and after the last the value is
  held. The shape "step" jumps to a point's value at its step.
  """

  points: tuple[tuple[float, float], ...]
  shape: str = "linear"

  def __post_init__(self):
    steps = [s for s, _ in self.points]
    if not steps or steps != sorted(set(steps)) or steps[0] < 0:
      raise InputError(
        f"schedule points {self.points}: steps start at 0 or later and rise from point to point"
      )
    if self.shape not in SHAPES:
      raise InputError(f"schedule shape {self.shape!r} is unknown; it can be one of {SHAPES}")

  def __call__(self, step: jax.Array | int) -> jax.Array:
    """Returns the value at a step, a float32 scalar."""
    if len(self.points) == 1:  # known to the compiler: logits / 1 is then no work
      return jnp.asarray(self.points[0][1], jnp.float32)
    xs = jnp.asarray([s for s, _ in self.points], jnp.float32)
    ys = jnp.asarray([v for _, v in self.points], jnp.float32)
    step = jnp.asarray(step, jnp.float32)
    i = jnp.clip(jnp.searchsorted(xs, step, side="right") - 1, 0, len(self.points) - 1)
    j = jnp.minimum(i + 1, len(self.points) - 1)
    part = jnp.clip((step - xs[i]) / jnp.maximum(xs[j] - xs[i], 1), 0, 1)
    if self.shape == "cosine":
      part = 0.5 - 0.5 * jnp.cos(jnp.pi * part)
    elif self.shape == "step":
      part = jnp.floor(part)
    return ys[i] + part * (ys[j] - ys[i])

  @property
  def values(self) -> tuple[float, ...]:
    """The values at its points, between which all others lie."""
    return tuple(v for _, v in self.points)

  @property
  def last_step(self) -> float:
    """The step from which it is constant."""
    return self.points[-1][0]


def constant(value: float) -> Schedule:
  """Returns the schedule that is `value` at every step."""
  return Schedule(((0, float(value)),))
