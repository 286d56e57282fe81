"""Embeddings of whole images or texts, brought to the teacher's."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from distill_jax.errors import InputError
from distill_jax.losses._base import FeatureLoss
from distill_jax.losses.features import Features, FeatureSpec, Pairs
from distill_jax.nn import layers
from distill_jax.nn.params import param
from distill_jax.types import Batch, FamilyConfig, Mean, PyTree

PROJECTIONS = ("none", "orthogonal")


@dataclasses.dataclass(frozen=True)
class Loss(FeatureLoss):
  """|student - teacher|^2 of embeddings of length 1, the mean over positions.

  CLIP-KD's feature distillation (arXiv:2307.12732, equation 4), for the image and for the text;
  a text encoder has one position. It is 2 - 2 cos(student, teacher).

  Attributes:
    projection: from the student's width to the teacher's, trained, initialised "orthogonal";
      "none" where the widths are equal.
  """

  projection: str = "none"

  compares_embeddings: ClassVar[bool] = True

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.projection not in PROJECTIONS:
      raise InputError(f"projection is {self.projection!r}; it is one of {PROJECTIONS}")

  def feature_specs(
    self, pairs: Pairs, student: FamilyConfig, teacher: FamilyConfig
  ) -> tuple[FeatureSpec, FeatureSpec]:
    """None, as embeddings are among a model's outputs; refuses families without them."""
    for role, config in (("student", student), ("teacher", teacher)):
      if config.embedding_size is None:
        raise InputError(
          f"the loss embedding compares embeddings of whole inputs, which the {role}'s family "
          f"({type(config).__module__.rpartition('.')[2]}) does not output; use the loss hidden"
        )
    return super().feature_specs(pairs, student, teacher)

  def adapter_width(self, teacher: FamilyConfig, recorded_width: int | None) -> int:
    del recorded_width
    assert teacher.embedding_size is not None  # feature_specs refuses others
    return teacher.embedding_size

  def init(
    self, key: jax.Array, pairs: Pairs, student: FamilyConfig, width: int
  ) -> dict[str, PyTree]:
    """The projection [I, O]; {} where the widths are equal."""
    del pairs
    D = student.embedding_size
    if (width == D) != (self.projection == "none"):
      raise InputError(
        f"projection is {self.projection!r}, the student's embeddings have {D} numbers and the "
        f"teacher's {width}; it is 'none' where they are equal, 'orthogonal' where they differ"
      )
    if width == D:
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
