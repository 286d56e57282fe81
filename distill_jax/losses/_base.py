"""Base classes of the two kinds of losses."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp

from distill_jax.errors import bad_value
from distill_jax.losses import features
from distill_jax.losses.features import Features, FeatureSpec, Pairs
from distill_jax.schedules import Schedule, constant
from distill_jax.types import Batch, FamilyConfig, Mean, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseLoss:
  """The interface between the training step and a loss.

  The fields are the loss's config keys. A number passed for a Schedule becomes a constant
  schedule, so that `losses.KD(temperature=2.0)` works without a config.
  """

  reads_spans: ClassVar[bool] = False  # True if the loss can use SpanTargets

  weight: Schedule = constant(1.0)
  """Weight of this loss in the sum that is minimised: a number or a schedule.

  The training step multiplies by it; `token_loss` and `feature_loss` return unweighted values.
  """

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(field.default, Schedule) and not isinstance(value, Schedule):
        if not isinstance(value, numbers.Real):
          raise bad_value(field.name, value, "a number or a Schedule", "Pass one of them")
        object.__setattr__(self, field.name, constant(float(value)))

  @property
  def teacher_names(self) -> tuple[str, ...]:
    """Names of the teachers this loss uses; () for a loss that only needs labels."""
    return ()

  @property
  def rollout_scalars(self) -> tuple[str, ...]:
    """Names of the fields of types.Rollout that this loss needs, without axes; () for none."""
    return ()

  def schedules(self) -> dict[str, Schedule]:
    """Returns the fields that are schedules, by name."""
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return {name: value for name, value in values.items() if isinstance(value, Schedule)}

  def check_records(self, kind: str, has_logp: bool, temperature: float, missing_mass: str) -> None:
    """Checks that this loss can use the targets of a store; by default every loss can.

    Args:
      kind: Kind of the records, e.g. "sampled".
      has_logp: True if sampled records hold log-probabilities.
      temperature: Temperature of the recorded distribution.
      missing_mass: Convention for the mass outside top-k entries.

    Raises:
      InputError: The loss would be biased with these records.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLoss(BaseLoss):
  """A loss computed from the logits of each position, one chunk at a time."""

  def token_loss(self, logits_BCV: jax.Array, batch: Batch, step: jax.Array | int) -> jax.Array:
    """Returns the unweighted loss of each position in nats, float32 [B, C].

    Args:
      logits_BCV: The student's logits, float32.
      batch: Labels, mask and targets of the chunk.
      step: The step number, at which schedules are evaluated.
    """
    raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureLoss(BaseLoss):
  """A loss computed from features of whole sequences."""

  teacher: str = "teacher"
  """Name of the teacher whose features are compared."""

  compares_embeddings: ClassVar[bool] = False  # True if the loss reads Features.embedding_BTD

  @property
  def teacher_names(self) -> tuple[str, ...]:
    return (self.teacher,)

  def pairs(self, student: FamilyConfig, teacher: FamilyConfig) -> Pairs:
    """Returns the (student layer, teacher layer) pairs whose features are compared.

    Args:
      student: The student's architecture config.
      teacher: The teacher's architecture config.
    """
    del student, teacher
    return ()

  def feature_specs(
    self, pairs: Pairs, student: FamilyConfig, teacher: FamilyConfig
  ) -> tuple[FeatureSpec, FeatureSpec]:
    """Returns the features needed from the student and from the teacher.

    Args:
      pairs: The pairs of layers, from `pairs`.
      student: The student's architecture config.
      teacher: The teacher's architecture config.
    """
    del pairs, student, teacher
    return FeatureSpec(), FeatureSpec()

  def adapter_width(self, teacher: FamilyConfig, recorded_width: int | None) -> int:
    """Returns the width of the teacher features that adapters project to; 0 without adapters.

    Args:
      teacher: The teacher's architecture config.
      recorded_width: Width of the recorded features, which may be projected; None for an online
        teacher.
    """
    del teacher, recorded_width
    return 0

  def init(
    self, key: jax.Array, pairs: Pairs, student: FamilyConfig, width: int
  ) -> dict[str, PyTree]:
    """Returns the adapters: parameters of this loss that are trained with the student.

    By default a loss has no adapters.

    Args:
      key: Random key.
      pairs: The pairs of layers, from `pairs`.
      student: The student's architecture config.
      width: The width that `adapter_width` returned.
    """
    del key, pairs, student, width
    return {}

  @property
  def fits_adapters(self) -> bool:
    """True if `fit` replaces the adapters before the first step."""
    return False

  def fit(
    self,
    adapters: dict[str, PyTree],
    pairs: Pairs,
    student: Features,
    teacher: Features,
    batch: Batch,
  ) -> dict[str, PyTree]:
    """Returns adapters fitted to one batch."""
    raise NotImplementedError

  def feature_loss(
    self,
    student: Features,
    teacher: Features,
    adapters: dict[str, PyTree],
    batch: Batch,
    pairs: Pairs,
  ) -> Mean:
    """Returns the unweighted loss as a mean over labels."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerPairLoss(FeatureLoss):
  """A FeatureLoss averaged over pairs of layers."""

  layers: str = "last"
  """Layers to compare: "uniform", "last", or student:teacher pairs such as "0:4 5:29".

  "uniform" pairs every student layer with a teacher layer at equal steps; "last" pairs the last
  layers.
  """

  def pairs(self, student: FamilyConfig, teacher: FamilyConfig) -> Pairs:
    return features.pairs(self.layers, student.num_hidden_layers, teacher.num_hidden_layers)

  def feature_specs(
    self, pairs: Pairs, student: FamilyConfig, teacher: FamilyConfig
  ) -> tuple[FeatureSpec, FeatureSpec]:
    """Returns specs of the hidden states of the paired layers."""
    del student, teacher
    ours, theirs = zip(*pairs, strict=True)
    return FeatureSpec(hidden=ours), FeatureSpec(hidden=theirs)

  def pair_losses(
    self,
    student: Features,
    teacher: Features,
    adapters: dict[str, PyTree],
    batch: Batch,
    pairs: Pairs,
  ) -> Iterator[Mean]:
    """Yields one or more losses per pair, which are averaged."""
    raise NotImplementedError

  def feature_loss(
    self,
    student: Features,
    teacher: Features,
    adapters: dict[str, PyTree],
    batch: Batch,
    pairs: Pairs,
  ) -> Mean:
    total, n = Mean(jnp.zeros(()), jnp.zeros(())), 0
    for mean in self.pair_losses(student, teacher, adapters, batch, pairs):
      total, n = total + mean, n + 1
    return Mean(total.total / n, total.count / n)
