"""The two kinds of losses, with what every loss of a kind has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp

from distill_jax.losses import features
from distill_jax.losses.features import Features, FeatureSpec, Pairs
from distill_jax.schedules import Schedule, constant
from distill_jax.types import Batch, FamilyConfig, Mean, PyTree


@dataclasses.dataclass(frozen=True)
class BaseLoss:
  """What the training step asks of any loss.

  Fields are the loss's config keys. A number given for a Schedule is that constant, so that
  `kd.Loss(temperature=2.0)` works without a config.

  Attributes:
    weight: of this loss in the sum that is minimised. The step multiplies by it, not the loss.
  """

  weight: Schedule = constant(1.0)

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(field.default, Schedule) and isinstance(value, int | float):
        object.__setattr__(self, field.name, constant(value))

  @property
  def teacher_names(self) -> tuple[str, ...]:
    """The teachers that this loss learns from; () for one that needs labels alone."""
    return ()

  def schedules(self) -> dict[str, Schedule]:
    """The fields that follow the step, by name."""
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return {name: value for name, value in values.items() if isinstance(value, Schedule)}

  def check_records(self, kind: str, has_logp: bool, temperature: float, missing_mass: str) -> None:
    """Refuses records whose targets this loss cannot use; by default it can use all.

    Args:
      kind: of the records.
      has_logp: whether sampled records hold log-probabilities.
      temperature: of the recorded distribution.
      missing_mass: the convention of top-k records.

    Raises:
      InputError: they would give a biased loss.
    """


@dataclasses.dataclass(frozen=True)
class TokenLoss(BaseLoss):
  """A loss of each position's logits, which the fused head runs a chunk at a time."""

  def token_loss(self, logits_BCV: jax.Array, batch: Batch, step: jax.Array | int) -> jax.Array:
    """The loss of each position, float32 [B, C], in nats, without its weight.

    Args:
      logits_BCV: the student's, float32.
      batch: the chunk's labels, mask and targets.
      step: the step number, which schedules follow.
    """
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class FeatureLoss(BaseLoss):
  """A loss of features of whole sequences.

  Attributes:
    teacher: whose features.
  """

  teacher: str = "teacher"

  compares_embeddings: ClassVar[bool] = False  # it reads Features.embedding_BTD

  @property
  def teacher_names(self) -> tuple[str, ...]:
    return (self.teacher,)

  def pairs(self, student: FamilyConfig, teacher: FamilyConfig) -> Pairs:
    """The (student layer, teacher layer) pairs whose features are compared.

    Args:
      student, teacher: their configs.
    """
    del student, teacher
    return ()

  def feature_specs(
    self, pairs: Pairs, student: FamilyConfig, teacher: FamilyConfig
  ) -> tuple[FeatureSpec, FeatureSpec]:
    """The features that the student and the teacher have to give, from their configs."""
    del pairs, student, teacher
    return FeatureSpec(), FeatureSpec()

  def adapter_width(self, teacher: FamilyConfig, recorded_width: int | None) -> int:
    """The width of the teacher's features that adapters project to; 0 without adapters.

    Args:
      teacher: its config.
      recorded_width: of its features in records, which may project them; None if it is online.
    """
    del teacher, recorded_width
    return 0

  def init(
    self, key: jax.Array, pairs: Pairs, student: FamilyConfig, width: int
  ) -> dict[str, PyTree]:
    """The adapters: parameters that this loss owns, trained with the student. By default none.

    Args:
      student: its config.
      width: see adapter_width.
    """
    del key, pairs, student, width
    return {}

  @property
  def fits_adapters(self) -> bool:
    """Whether `fit` replaces the adapters before the first step."""
    return False

  def fit(
    self,
    adapters: dict[str, PyTree],
    pairs: Pairs,
    student: Features,
    teacher: Features,
    batch: Batch,
  ) -> dict[str, PyTree]:
    """The adapters as fitted on one batch."""
    raise NotImplementedError

  def feature_loss(
    self,
    student: Features,
    teacher: Features,
    adapters: dict[str, PyTree],
    batch: Batch,
    pairs: Pairs,
  ) -> Mean:
    """The loss as a mean over labels, without its weight."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class LayerPairLoss(FeatureLoss):
  """A FeatureLoss that is the mean over pairs of layers.

  Attributes:
    layers: see features.pairs.
  """

  layers: str = "last"

  def pairs(self, student: FamilyConfig, teacher: FamilyConfig) -> Pairs:
    return features.pairs(self.layers, student.num_hidden_layers, teacher.num_hidden_layers)

  def feature_specs(
    self, pairs: Pairs, student: FamilyConfig, teacher: FamilyConfig
  ) -> tuple[FeatureSpec, FeatureSpec]:
    """The hidden states of the paired layers."""
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
    """The loss of each pair, or several for each."""
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
