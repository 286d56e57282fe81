"""Hidden-state loss: distance between hidden states of chosen layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from distill_jax.errors import bad_value, check_choice
from distill_jax.losses import features
from distill_jax.losses._base import LayerPairLoss
from distill_jax.losses.features import Features, Pairs
from distill_jax.nn.params import param
from distill_jax.types import Batch, FamilyConfig, Mean, PyTree

DISTANCES, PROJECTIONS = ("mse", "cosine"), ("none", "orthogonal", "least_squares")
RIDGE = 1e-4  # times the mean squared activation; makes the least-squares solution unique


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss(LayerPairLoss):
  """Distance between hidden states, averaged over pairs of layers.

  Follows FitNets (arXiv:1412.6550) and PKD (arXiv:1908.09355). The distances are relative, so
  that a weight means the same at every width and depth.
  """

  layers: str = "uniform"
  """Layers to compare: "uniform", "last", or student:teacher pairs such as "0:4 5:29".

  "uniform" pairs every student layer with a teacher layer at equal steps; "last" pairs the last
  layers.
  """
  distance: str = "mse"
  """Distance: "mse" or "cosine".

  "mse" is |student - teacher|^2 / |teacher|^2; "cosine" is 1 - cos(student, teacher).
  """
  projection: str = "none"
  """Projection from the student's width to the teacher's: "none", "orthogonal" or "least_squares".

  "none" is for equal widths. The other two are trained; they are initialised to an orthogonal
  matrix, or to the least-squares fit on the first batch.
  """

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.distance not in DISTANCES:
      raise bad_value("distance", self.distance, " or ".join(map(repr, DISTANCES)), "Correct it")
    check_choice("projection", self.projection, PROJECTIONS, "Correct it")

  def adapter_width(self, teacher: FamilyConfig, recorded_width: int | None) -> int:
    return teacher.hidden_size if recorded_width is None else recorded_width

  def init(
    self, key: jax.Array, pairs: Pairs, student: FamilyConfig, width: int
  ) -> dict[str, PyTree]:
    """Returns the projections [P, I, O], one per pair; {} if the widths are equal.

    Raises:
      InputError: The key `projection` does not fit the widths.
    """
    D, n = student.hidden_size, len(pairs)
    widths = f"hidden states of width {D} (student) and {width} (teacher)"
    trained = "'orthogonal' or 'least_squares'"
    if not features.needs_projection(self.projection, width != D, trained, widths):
      return {}
    project = param(key, f"pairs:{n} embed:{D} teacher_embed:{width}", "", init="zeros")
    keys = jax.random.split(key, n)
    orthogonal = jax.nn.initializers.orthogonal()
    start = jax.vmap(lambda k: orthogonal(k, (D, width)))(keys)
    return {"project": project.replace(start)}

  @property
  def fits_adapters(self) -> bool:
    return self.projection == "least_squares"

  def fit(
    self,
    adapters: dict[str, PyTree],
    pairs: Pairs,
    student: Features,
    teacher: Features,
    batch: Batch,
  ) -> dict[str, PyTree]:
    """Returns the projections that best map the student's hidden states to the teacher's."""
    positions = next(iter(student.hidden.values())).shape[1]
    valid_N1 = features.feature_positions(batch, positions).valid_BS.reshape(-1, 1)

    def rows(x_BSD: jax.Array) -> jax.Array:
      return jnp.where(valid_N1, x_BSD.reshape(-1, x_BSD.shape[-1]).astype(jnp.float32), 0)

    solved = [_least_squares(rows(student.hidden[a]), rows(teacher.hidden[b])) for a, b in pairs]
    return {"project": adapters["project"].replace(jnp.stack(solved))}

  def pair_losses(
    self,
    student: Features,
    teacher: Features,
    adapters: dict[str, PyTree],
    batch: Batch,
    pairs: Pairs,
  ) -> Iterator[Mean]:
    for i, (a, b) in enumerate(pairs):
      s = student.hidden[a].astype(jnp.float32)
      t = jax.lax.stop_gradient(teacher.hidden[b].astype(jnp.float32))
      valid_BS1 = features.feature_positions(batch, s.shape[1]).valid_BS[..., None]
      s, t = jnp.where(valid_BS1, s, 0), jnp.where(valid_BS1, t, 0)
      if adapters:
        s = s @ adapters["project"][i]
      yield features.mean_over_labels(_distance(self.distance, s, t), batch)


def _least_squares(s_NI: jax.Array, t_NO: jax.Array) -> jax.Array:
  """Returns the projection [I, O] with the least squared error, with a small ridge."""
  square_II = s_NI.T @ s_NI
  ridge = RIDGE * jnp.trace(square_II) / len(square_II)
  return jnp.linalg.solve(square_II + ridge * jnp.eye(len(square_II)), s_NI.T @ t_NO)


def _distance(kind: str, s: jax.Array, t: jax.Array) -> jax.Array:
  """Returns the distance per position, float32; 0 where the teacher's vector is 0 (masked)."""
  t2 = jnp.sum(t * t, -1)
  if kind == "mse":
    return jnp.sum((s - t) ** 2, -1) / jnp.where(t2 > 0, t2, 1)
  s2 = jnp.sum(s * s, -1)
  both = (s2 > 0) & (t2 > 0)  # the cosine of a zero vector is undefined; its gradient is 0
  cos = jnp.sum(s * t, -1) * jax.lax.rsqrt(jnp.where(both, s2 * t2, 1))
  return jnp.where(both, 1 - cos, 0)
