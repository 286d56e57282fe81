"""Schedules: values that depend on the step, for weights and temperatures of losses."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from distill_jax.errors import bad_value, check_choice

SHAPES = ("linear", "cosine", "step")


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A value that depends on the step: (step, value) points, and an interpolation between them.

  Before the first point and after the last one the value is constant, so one point is a constant,
  and ((0, 0), (100, 0), (200, 1)) is a delayed ramp.

  Raises:
    InputError: the points or the shape are invalid.
  """

  points: tuple[tuple[float, float], ...]
  """(step, value) pairs with rising steps, the first at least 0."""
  shape: str = "linear"
  """Interpolation between two points: "linear", "cosine", or "step" (constant until the step of the
  next point)."""

  def __post_init__(self):
    steps = [s for s, _ in self.points]
    if not steps or steps != sorted(set(steps)) or steps[0] < 0:
      expected = "(step, value) pairs with rising steps, the first at least 0"
      raise bad_value("points", self.points, expected, "Change them")
    check_choice("shape", self.shape, SHAPES, "Choose one")

  def __call__(self, step: jax.Array | int) -> jax.Array:
    """Returns the value at a step, a float32 scalar."""
    if len(self.points) == 1:  # a constant for the compiler, which then removes logits / 1
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
    """The values at the points. All other values are between them."""
    return tuple(v for _, v in self.points)

  @property
  def last_step(self) -> float:
    """The step from which the value is constant."""
    return self.points[-1][0]


def constant(value: float) -> Schedule:
  """Returns a schedule with the same value at every step."""
  return Schedule(((0, float(value)),))
