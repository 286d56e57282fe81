"""Embeddings: what stands for a whole picture or text, brought to where the teacher has it."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from distill_jax.errors import InputError
from distill_jax.losses.features import Features, FeatureSpec, Pairs
from distill_jax.nn import layers
from distill_jax.nn.params import param
from distill_jax.schedules import Schedule, constant
from distill_jax.types import Batch, Mean

PROJECTIONS = ("none", "orthogonal")


@dataclasses.dataclass(frozen=True)
class Loss:
  """|student - teacher|^2 of embeddings of length 1, the mean over positions.

  CLIP-KD's feature distillation (arXiv:2307.12732, equation 4), of the picture and of the text;
  of a text encoder it is of its one position. It is 2 - 2 cos(student, teacher).

  Attributes:
    projection: from the student's width to the teacher's, learned, beginning "orthogonal"; "none"
      where the widths are equal.
  """

  weight: Schedule = constant(1.0)
  teacher: str = "teacher"
  projection: str = "none"

  layers: ClassVar[str] = "last"  # it compares none, but every loss of features names some
  embeds: ClassVar[bool] = True  # it reads Features.embedding_BTD

  def __post_init__(self):
    if self.projection not in PROJECTIONS:
      raise InputError(f"projection is {self.projection!r}; it is one of {PROJECTIONS}")

  def needs(self, pairs: Pairs, student: Any, teacher: Any) -> tuple[FeatureSpec, FeatureSpec]:
    del pairs
    for who, c in (("student", student), ("teacher", teacher)):
      if not hasattr(c, "embedding_size"):
        raise InputError(
          f"the loss embedding compares what stands for a whole input, which the {who}'s family "
          f"({type(c).__module__.rpartition('.')[2]}) does not say; take the loss hidden"
        )
    return FeatureSpec(), FeatureSpec()

  def width(self, teacher: Any) -> int:
    """Numbers that a teacher of this config gives."""
    return teacher.embedding_size

  def init(self, key: jax.Array, pairs: Pairs, student: Any, width: int) -> dict[str, Any]:
    """The projection [D, E]; {} where the widths are equal."""
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

  def whole(
    self,
    student: Features,
    teacher: Features,
    adapters: dict[str, Any],
    batch: Batch,
    pairs: Pairs,
  ) -> Mean:
    del pairs
    assert student.embedding_BTD is not None and teacher.embedding_BTD is not None
    keep_BT1 = batch.mask_BT[..., None]
    s_BTD = jnp.where(keep_BT1, student.embedding_BTD.astype(jnp.float32), 0)
    t_BTE = jnp.where(keep_BT1, jax.lax.stop_gradient(teacher.embedding_BTD), 0)
    if adapters:
      s_BTD = s_BTD @ adapters["project"][...]
    gap_BTE = layers.unit(s_BTD) - layers.unit(t_BTE)
    return Mean.of(jnp.sum(gap_BTE**2, -1), batch.mask_BT)
