"""Embedding loss: distance between the embeddings of whole images or texts."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from distill_jax.errors import InputError, bad_value
from distill_jax.losses import features
from distill_jax.losses._base import FeatureLoss
from distill_jax.losses.features import Features, FeatureSpec, Pairs
from distill_jax.nn import layers
from distill_jax.nn.params import param
from distill_jax.types import Batch, FamilyConfig, Mean, PyTree

PROJECTIONS = ("none", "orthogonal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss(FeatureLoss):
  """Squared distance between embeddings normalised to length 1, averaged over positions.

  This is the feature distillation of CLIP-KD (arXiv:2307.12732, equation 4) and equals
  2 - 2 cos(student, teacher). CLIP has two positions, the image and the text; a text encoder has
  one.
  """

  projection: str = "none"
  """Projection from the student's width to the teacher's: "none" or "orthogonal".

  "none" is for equal widths. "orthogonal" is a trained projection initialised to an orthogonal
  matrix.
  """

  compares_embeddings: ClassVar[bool] = True

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.projection not in PROJECTIONS:
      raise bad_value("projection", self.projection, "'none' or 'orthogonal'", "Correct it")

  def feature_specs(
    self, pairs: Pairs, student: FamilyConfig, teacher: FamilyConfig
  ) -> tuple[FeatureSpec, FeatureSpec]:
    """Returns empty specs: embeddings are model outputs and need no taps.

    Raises:
      InputError: A model does not output embeddings.
    """
    for role, config in (("student", student), ("teacher", teacher)):
      if config.embedding_size is None:
        raise InputError(
          f"The loss 'embedding' needs embeddings of whole inputs, but the {role}'s family "
          f"({type(config).__module__.rpartition('.')[2]}) does not output them. Use the loss "
          "'hidden'."
        )
    return super().feature_specs(pairs, student, teacher)

  def adapter_width(self, teacher: FamilyConfig, recorded_width: int | None) -> int:
    del recorded_width
    assert teacher.embedding_size is not None  # checked by feature_specs
    return teacher.embedding_size

  def init(
    self, key: jax.Array, pairs: Pairs, student: FamilyConfig, width: int
  ) -> dict[str, PyTree]:
    """Returns the projection [I, O]; {} if the widths are equal.

    Raises:
      InputError: The key `projection` does not fit the widths.
    """
    del pairs
    D = student.embedding_size
    widths = f"student embeddings of width {D} and teacher embeddings of width {width}"
    if not features.needs_projection(self.projection, width != D, "'orthogonal'", widths):
      return {}
    project = param(key, f"embed:{D} teacher_embed:{width}", "", init="zeros")
    return {"project": project.replace(jax.nn.initializers.orthogonal()(key, (D, width)))}

  def feature_loss(
    self,
    student: Features,
    teacher: Features,
    adapters: dict[str, PyTree],
    batch: Batch,
    pairs: Pairs,
  ) -> Mean:
    del pairs
    assert student.embedding_BTD is not None and teacher.embedding_BTD is not None
    mask_BT1 = batch.mask_BT[..., None]
    s_BTD = jnp.where(mask_BT1, student.embedding_BTD.astype(jnp.float32), 0)
    t_BTO = jnp.where(mask_BT1, jax.lax.stop_gradient(teacher.embedding_BTD), 0)
    if adapters:
      s_BTD = s_BTD @ adapters["project"][...]
    gap_BTO = layers.unit(s_BTD) - layers.unit(t_BTO)
    return Mean.of(jnp.sum(gap_BTO**2, -1), batch.mask_BT)
