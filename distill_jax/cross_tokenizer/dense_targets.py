"""Targets of a teacher with another tokenizer that runs here: its text, and its distributions.

A batch has the student's rows, and beside them the teacher's rows of the same text (TeacherText).
The teacher runs on its own rows; its hidden states at the positions of the chains make
ProjectedTargets, whose distributions exist for one chunk of student positions at a time. For each
student position they hold DEPTH hidden states.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from distill_jax.cross_tokenizer import dense
from distill_jax.cross_tokenizer.dense import DenseTables, Links
from distill_jax.losses import DenseTargets
from distill_jax.nn import fused_head
from distill_jax.types import Inputs, Output, Targets


class TeacherText(Targets, kw_only=True):
  """The teacher's rows of a batch's text, before the teacher has run.

  Attributes:
    inputs: The tokens of the teacher, [B, positions of the teacher].
    links_BTLF: int32, the chains of the student's positions; F are the fields of `Links`.
  """

  inputs: Inputs
  links_BTLF: jax.Array

  def of_output(
    self, out: Output, labels_BT: jax.Array, tables: DenseTables, min_mass: float
  ) -> ProjectedTargets:
    """Returns the targets of the teacher's outputs on `inputs`.

    Args:
      out: The outputs.
      labels_BT: The student's labels.
      tables: The tables of both tokenizers.
      min_mass: See `dense.project`.
    """
    B, T = labels_BT.shape
    place_BT = jnp.maximum(self.links_BTLF[..., 0] - 1, 0).reshape(B, -1)
    hidden_BTD = jnp.take_along_axis(out.hidden_BTD, place_BT[..., None], 1)
    return ProjectedTargets(
      hidden_BTD=hidden_BTD.reshape(B, T, -1),
      head_VD=SortedHead(tables.sort_head(out.head_VD), tables),
      soft_cap=out.soft_cap,
      links_BTLF=self.links_BTLF,
      labels_BT=labels_BT,
      min_mass=min_mass,
    )


class SortedHead(struct.PyTreeNode):
  """The teacher's head, and the tables, which belong to all positions.

  Attributes:
    rows_VD: The teacher's unembedding, from DenseTables.sort_head.
    tables: The tables of both tokenizers.
  """

  rows_VD: jax.Array
  tables: DenseTables


class ProjectedTargets(DenseTargets, kw_only=True):
  """Outputs of a teacher with another tokenizer, as distributions over the student's tokens.

  Attributes:
    hidden_BTD: The teacher's hidden states at the levels of each student position, one after
      another: [B, T, DEPTH times the teacher's width].
    head_VD: A SortedHead.
    links_BTLF: See TeacherText.
    labels_BT: The student's labels.
    min_mass: See `dense.project`.
  """

  links_BTLF: jax.Array
  labels_BT: jax.Array
  min_mass: float = struct.field(pytree_node=False, default=0.0)

  def logits(self) -> jax.Array:
    """Returns the logarithms of the projected probabilities, float32 [B, C, student tokens].

    Tokens to which nothing leads have the smallest probability of float32: unlike padding rows of
    the head, they are outcomes.
    """
    if self.logits_BTV is not None:
      return self.logits_BTV
    head, tables = self.head_VD.rows_VD, self.head_VD.tables
    is_token_V = jnp.arange(len(head)) < len(tables.order_V)

    def logits(hidden_XD: jax.Array) -> jax.Array:
      z_1XV = fused_head.soft_cap(fused_head.logits(hidden_XD[None], head), self.soft_cap)
      return jnp.where(is_token_V[None], z_1XV[0], -jnp.inf)

    B, C, L, _ = self.links_BTLF.shape
    hidden_LXD = levels_first(self.hidden_BTD.reshape(B, C, L, -1))
    links_LX = links_of(self.links_BTLF)
    labels_X = self.labels_BT.reshape(-1)
    out = dense.project(logits, hidden_LXD, links_LX, labels_X, tables, self.min_mass)
    return jnp.log(jnp.maximum(out.p_XS, dense.SMALLEST)).reshape(B, C, -1)


def levels_first(x_BCLD: jax.Array) -> jax.Array:
  """Returns an array of levels as [L, X, ...]."""
  B, C, L = x_BCLD.shape[:3]
  return jnp.moveaxis(x_BCLD.reshape(B * C, L, *x_BCLD.shape[3:]), 1, 0)


def links_of(links_BCLF: jax.Array) -> Links:
  """Returns the fields of chains, each [L, X]."""
  links_FLX = jnp.moveaxis(levels_first(links_BCLF), -1, 0)
  return Links(*links_FLX)
