"""Features that losses compare: hidden states, queries, keys and values of chosen layers.

The outputs of other layers are not kept. Queries, keys and values of layer l are recomputed from
the output of layer l - 1, so that only that output is stored.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
from flax import struct

from distill_jax.errors import bad_value
from distill_jax.nn.layers import ComputeConfig
from distill_jax.types import (
  QKV,
  Batch,
  FamilyConfig,
  ImageText,
  Inputs,
  Mean,
  Model,
  ModelInputs,
  Output,
  SourceTarget,
)

Pairs = tuple[tuple[int, int], ...]  # (student layer, teacher layer)


class AttentionSizes(FamilyConfig, Protocol):
  """Protocol of the config of a model with attention."""

  @property
  def num_attention_heads(self) -> int:
    """Number of query heads."""

  @property
  def num_key_value_heads(self) -> int:
    """Number of key and value heads."""

  @property
  def head_dim(self) -> int:
    """Width of the queries and keys of one head."""

  @property
  def value_head_dim(self) -> int:
    """Width of the values of one head; in DeepSeek it is less than `head_dim`."""


def attention_sizes(config: FamilyConfig) -> AttentionSizes:
  """Returns the config typed as that of a model with attention; the caller knows that it is."""
  return cast(AttentionSizes, config)


class Features(struct.PyTreeNode):
  """Features of a model.

  Attributes:
    hidden: Hidden states [B, T, D], by layer.
    qkv: Queries, keys and values, each [B, T, heads, h], by layer.
    embedding_BTD: Embedding of the whole input at each position, for families that output it.
  """

  hidden: dict[int, jax.Array]
  qkv: dict[int, QKV]
  embedding_BTD: jax.Array | None = None


def needs_projection(projection: str, widths_differ: bool, trained: str, widths: str) -> bool:
  """Returns whether a loss projects the student's features to the teacher's width.

  Args:
    projection: The key `projection` of the loss.
    widths_differ: True if the two widths differ.
    trained: The values of `projection` for different widths, for the error.
    widths: The two widths, for the error.

  Raises:
    InputError: The key does not fit the widths.
  """
  if widths_differ == (projection == "none"):
    expected = trained if widths_differ else "'none'"
    raise bad_value("projection", projection, f"{expected} for {widths}", f"Set it to {expected}")
  return widths_differ


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
  """Layers whose features are extracted from a model: hidden states, and (q, k, v)."""

  hidden: tuple[int, ...] = ()
  qkv: tuple[int, ...] = ()

  def __or__(self, other: FeatureSpec) -> FeatureSpec:
    hidden = tuple(sorted({*self.hidden, *other.hidden}))
    return FeatureSpec(hidden, tuple(sorted({*self.qkv, *other.qkv})))

  @property
  def taps(self) -> tuple[int, ...]:
    """Layers whose outputs the model must return, in ascending order."""
    return tuple(sorted({*self.hidden, *(layer - 1 for layer in self.qkv)}))

  def extract(
    self, model: Model, out: Output, inputs: ModelInputs, compute: ComputeConfig
  ) -> Features:
    """Returns the features, given the outputs of a model called with `taps`.

    Args:
      model: The model, which recomputes queries, keys and values.
      out: Its outputs.
      inputs: Its inputs.
      compute: The compute config it was called with.
    """
    if not self.taps:
      return Features({}, {}, out.embedding_BTD)
    assert out.taps_PBTD is not None
    tapped = dict(zip(self.taps, out.taps_PBTD, strict=True))
    qkv = {layer: model.qkv(layer, tapped[layer - 1], inputs, compute) for layer in self.qkv}
    return Features({layer: tapped[layer] for layer in self.hidden}, qkv, out.embedding_BTD)


def pairs(layers: str, student: int, teacher: int) -> Pairs:
  """Returns the (student layer, teacher layer) pairs to compare.

  Args:
    layers: "uniform" (each student layer with a teacher layer at equal steps, the last with the
      last, as in TinyBERT, arXiv:1909.10351; of a deeper student several with one), "last", or
      pairs such as "0:4 5:29".
    student: Number of layers of the student.
    teacher: Number of layers of the teacher.

  Raises:
    InputError: A pair is not two numbers, or a layer does not exist.
  """
  if layers == "uniform":
    return tuple((i, max(0, (i + 1) * teacher // student - 1)) for i in range(student))
  if layers == "last":
    return ((student - 1, teacher - 1),)
  try:
    a_b = [tuple(map(int, pair.split(":"))) for pair in layers.split()]
    chosen = tuple((a, b) for a, b in a_b)
  except ValueError:
    raise bad_value(
      "layers",
      layers,
      "'uniform', 'last' or student:teacher pairs such as '0:4 5:29'",
      "Correct it",
    ) from None
  bad = [(a, b) for a, b in chosen if not (0 <= a < student and 0 <= b < teacher)]
  if bad or not chosen:
    raise bad_value(
      "layers",
      layers,
      f"pairs of student layers 0 to {student - 1} and teacher layers 0 to {teacher - 1}",
      "Name existing layers",
    )
  return chosen


class FeaturePositions(NamedTuple):
  """Positions of a model's features, and which of them attend to each other.

  Attributes:
    valid_BS: bool [B, S], True where features are compared.
    segments_BS: int32 [B, S], the document of each position; 0 for padding. Positions attend
      within their document.
    causal: True if positions attend only to themselves and earlier positions.
  """

  valid_BS: jax.Array
  segments_BS: jax.Array
  causal: bool


def feature_positions(batch: Batch, positions: int) -> FeaturePositions:
  """Returns the positions whose features are compared.

  These are the labelled positions for decoders and all non-padding positions for encoders.

  Args:
    batch: The batch.
    positions: Number of positions of the features, S.
  """
  if batch.valid_BS is None:
    return FeaturePositions(batch.mask_BT, _decoder_inputs(batch).segments_BT, True)
  valid_BS = jnp.broadcast_to(batch.valid_BS, (len(batch.valid_BS), positions))
  return FeaturePositions(valid_BS, valid_BS.astype(jnp.int32), False)


def _decoder_inputs(batch: Batch) -> Inputs:
  """Returns the tokens that a decoder reads; of LLaVA, they include those of the image."""
  inputs = batch.model_inputs
  if isinstance(inputs, SourceTarget):
    return inputs.target
  if isinstance(inputs, ImageText):
    return inputs.texts
  assert isinstance(inputs, Inputs)
  return inputs


def mean_over_labels(x_BS: jax.Array, batch: Batch) -> Mean:
  """Returns the mean of x_BS over labels.

  For encoders, the value of a label is the mean over the input positions of its row.
  """
  if batch.valid_BS is None:
    return Mean.of(x_BS, batch.mask_BT)
  valid_BS = feature_positions(batch, x_BS.shape[1]).valid_BS
  total_B = jnp.sum(jnp.where(valid_BS, x_BS.astype(jnp.float32), 0), 1)
  x_B1 = (total_B / jnp.maximum(jnp.sum(valid_BS, 1), 1))[:, None]
  return Mean.of(jnp.broadcast_to(x_B1, batch.mask_BT.shape), batch.mask_BT)


def flat_qkv(qkv: QKV) -> jax.Array:
  """Concatenates (q, k, v) to one vector per position, [B, T, D], as records store them."""
  return jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in qkv], -1)


def unflat_qkv(x_BTD: jax.Array, config: FamilyConfig) -> QKV:
  """Splits vectors from `flat_qkv` into (q, k, v), for a teacher with this config."""
  c = attention_sizes(config)
  H, G, h = c.num_attention_heads, c.num_key_value_heads, c.head_dim
  q, k, v = jnp.split(x_BTD, [H * h, (H + G) * h], -1)
  q, k, v = (x.reshape(*x.shape[:2], n, -1) for x, n in ((q, H), (k, G), (v, G)))
  return q, k, v  # the width of values may differ from that of keys
