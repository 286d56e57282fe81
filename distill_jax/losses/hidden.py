"""Hidden states of chosen layers, through a learned projection where the widths differ."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.errors import InputError
from distill_jax.losses import features
from distill_jax.losses.features import Features, FeatureSpec, Pairs
from distill_jax.nn.params import param
from distill_jax.schedules import Schedule, constant
from distill_jax.types import Batch, Mean

DISTANCES, PROJECTIONS = ("mse", "cosine"), ("none", "orthogonal", "least_squares")
RIDGE = 1e-4  # of the mean squared activation, so that least squares has one answer


@dataclasses.dataclass(frozen=True)
class Loss:
  """The mean over layer pairs of a distance that has no unit.

  "mse" is |student - teacher|^2 / |teacher|^2, "cosine" 1 - cos(student, teacher); so a
  weight means the same at every width and depth (FitNets, arXiv:1412.6550; PKD,
  arXiv:1908.09355).

  Attributes:
    layers: see features.pairs.
    projection: from the student's width to the teacher's, learned: starts "orthogonal", or
      as the "least_squares" fit on the first batch; "none" where the widths are equal.
  """

  weight: Schedule = constant(1.0)
  teacher: str = "teacher"
  layers: str = "uniform"
  distance: str = "mse"
  projection: str = "none"

  def __post_init__(self):
    if self.distance not in DISTANCES or self.projection not in PROJECTIONS:
      raise InputError(
        f"distance is {self.distance!r} and projection {self.projection!r}; they are one of "
        f"{DISTANCES} and one of {PROJECTIONS}"
      )

  def needs(self, pairs: Pairs, student: Any, teacher: Any) -> tuple[FeatureSpec, FeatureSpec]:
    del student, teacher
    ours, theirs = zip(*pairs, strict=True)
    return FeatureSpec(hidden=ours), FeatureSpec(hidden=theirs)

  def init(self, key: jax.Array, pairs: Pairs, student: Any, width: int) -> dict[str, Any]:
    """The projections [P, D, E], one a pair; {} where the widths are equal.

    Args:
      student: its config.
      width: of the teacher's hidden states as they are given (records may project them).
    """
    D, n = student.hidden_size, len(pairs)
    if width == D and self.projection != "none":
      raise InputError(
        f"projection is {self.projection!r} and both hidden states have {D} numbers; leave it "
        "'none'"
      )
    if width != D and self.projection == "none":
      raise InputError(
        f"the student's hidden states have {D} numbers and the teacher's {width}; set projection "
        "to 'orthogonal' or 'least_squares'"
      )
    if width == D:
      return {}
    project = param(key, f"pairs:{n} embed:{D} teacher_embed:{width}", "", init="zeros")
    keys = jax.random.split(key, n)
    start = jax.vmap(lambda k: jax.nn.initializers.orthogonal()(k, (D, width)))(keys)
    return {"project": project.replace(start)}

  def fit(
    self,
    adapters: dict[str, Any],
    pairs: Pairs,
    student: Features,
    teacher: Features,
    batch: Batch,
  ) -> dict[str, Any]:
    """The projections that best map the student's hidden states of one batch."""
    positions = next(iter(student.hidden.values())).shape[1]
    keep_N = features.places(batch, positions).keep_BS.reshape(-1, 1)
    rows = lambda x: jnp.where(keep_N, x.reshape(-1, x.shape[-1]).astype(jnp.float32), 0)

    def solve(s_ND, t_NE):
      square = s_ND.T @ s_ND
      ridge = RIDGE * jnp.trace(square) / len(square)
      return jnp.linalg.solve(square + ridge * jnp.eye(len(square)), s_ND.T @ t_NE)

    solved = [solve(rows(student.hidden[a]), rows(teacher.hidden[b])) for a, b in pairs]
    return {"project": adapters["project"].replace(jnp.stack(solved))}

  def whole(
    self,
    student: Features,
    teacher: Features,
    adapters: dict[str, Any],
    batch: Batch,
    pairs: Pairs,
  ) -> Mean:
    total = Mean(jnp.zeros(()), jnp.zeros(()))
    for i, (a, b) in enumerate(pairs):
      s = student.hidden[a].astype(jnp.float32)
      t = jax.lax.stop_gradient(teacher.hidden[b].astype(jnp.float32))
      keep_BS1 = features.places(batch, s.shape[1]).keep_BS[..., None]
      s, t = jnp.where(keep_BS1, s, 0), jnp.where(keep_BS1, t, 0)
      if adapters:
        s = s @ adapters["project"][i]
      total += features.mean(_distance(self.distance, s, t), batch)
    return Mean(total.total / len(pairs), total.count / len(pairs))


def _distance(kind: str, s: jax.Array, t: jax.Array) -> jax.Array:
  """Per position, float32; 0 where the teacher's vector is 0 (masked positions)."""
  t2 = jnp.sum(t * t, -1)
  if kind == "mse":
    return jnp.sum((s - t) ** 2, -1) / jnp.where(t2 > 0, t2, 1)
  s2 = jnp.sum(s * s, -1)
  both = (s2 > 0) & (t2 > 0)  # a vector of length 0 has no direction, and no gradient
  cos = jnp.sum(s * t, -1) * jax.lax.rsqrt(jnp.where(both, s2 * t2, 1))
  return jnp.where(both, 1 - cos, 0)
