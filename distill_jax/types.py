"""The five nouns, and the legend of shape letters.

Arrays carry their axes as a suffix, `x_BTD`, one letter an axis:

  B batch (sequences)      D model width           K entries of a stored distribution
  T positions (tokens)     V vocabulary            P tapped layers
  L layers                 H query heads           h width of one head
  G key/value heads        F feed-forward width    C positions of one chunk

  S positions of a source  W height and width      M mel bins, or channels of an image

`_BT` is [batch, position], `_VD` the unembedding's rows, `_BWWM` images. A scalar has no suffix.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

IN_BATCH_CLASSES = 2**20  # "rows" of a head that is made of the batch itself: it never has so many


class Inputs(struct.PyTreeNode):
  """What a text model reads: all int32 [B, T].

  `segments_BT` numbers the documents packed into a row from 1; 0 is padding. Attention
  never crosses a segment, and positions start at 0 in each.
  """

  tokens_BT: jax.Array
  positions_BT: jax.Array
  segments_BT: jax.Array


class Images(struct.PyTreeNode):
  """What an image model reads: float32 [B, height, width, channels], normalised."""

  pixels_BWWM: jax.Array


class Sounds(struct.PyTreeNode):
  """What a speech model reads: log-mel frames, float32 [B, frames, bins]."""

  mel_BSM: jax.Array


class SourceTarget(struct.PyTreeNode):
  """What an encoder-decoder reads: the source, and the target as far as it has got."""

  source: Inputs | Sounds
  target: Inputs


class ImageText(struct.PyTreeNode):
  """What a model of pictures and words reads, one text an image."""

  images: Images
  texts: Inputs


class Targets(struct.PyTreeNode):
  """What a teacher said about each position, never the teacher itself.

  One of three supports, told apart by which fields are there:
    sampled  `ids_BTK`, `weight_BTK`: unbiased estimates of p, summing to 1; unused
             entries have weight 0.
    top-k    `ids_BTK`, `logp_BTK`: true log-probabilities; unused entries are -inf.
    dense    `hidden_BTD`, `head_VD`: an online teacher, its logits made a chunk at a time.
  """

  ids_BTK: jax.Array | None = None  # int32
  weight_BTK: jax.Array | None = None  # float32
  logp_BTK: jax.Array | None = None  # float32
  entropy_BT: jax.Array | None = None  # float32, nats
  label_logp_BT: jax.Array | None = None  # float32, nats: log p(label)
  top_BT: jax.Array | None = None  # int32: the likeliest token
  hidden_BTD: jax.Array | None = None
  head_VD: jax.Array | None = None
  soft_cap: float | None = struct.field(pytree_node=False, default=None)  # of its logits
  paired: bool = struct.field(pytree_node=False, default=False)  # see Output
  taps_BPTD: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Recorded:
  """What a store's manifest says of the targets that a step is given.

  Attributes:
    temperature: of the recorded distribution.
    missing_mass: the convention for what top-k records leave out.
    taps: the layers whose features are recorded, in order; `taps_of` is "hidden" or "qkv".
  """

  temperature: float = 1.0
  missing_mass: str = "tail_bucket"
  taps: tuple[int, ...] = ()
  taps_of: str = "hidden"


class Batch(struct.PyTreeNode):
  """One global training batch. `mask_BT` is the only mask: which labels are trained on.

  `smoothing_BT` is what labels lack in certainty, from 0 to 1; None: nothing. `rows_BT2` says
  among which rows of the head a position chooses, (first, past the last); None: all of them.
  `seen_BS` is for models that say one thing of all that they read, where features are not at
  the labels: the positions that are no padding, [B, 1] if none is; see features.places.
  `taught_BT` is of a student that gives two answers to a label (models/deit.py): whether a
  position is the answer that is held to teachers, and not to labels.
  """

  inputs: Any  # Inputs, Images, Sounds, SourceTarget or ImageText, as the model reads
  labels_BT: jax.Array  # int32
  mask_BT: jax.Array  # bool
  targets: dict[str, Targets] = struct.field(default_factory=dict)
  smoothing_BT: jax.Array | None = None  # float32
  rows_BT2: jax.Array | None = None  # int32
  valid_BS: jax.Array | None = None  # bool
  distill_token_BT: jax.Array | None = None  # bool

  def mask_of(self, taught: bool) -> jax.Array:
    """The positions that losses and metrics against teachers, or against labels, are of."""
    return (
      self.mask_BT
      if self.distill_token_BT is None
      else self.mask_BT & (self.distill_token_BT == taught)
    )

  def paired(self) -> Batch:
    """With labels and rows for a head that is the batch itself: B texts, then their B images.

    Position 0 of row i, its image, chooses row i of the first B, position 1, its text, row
    B + i of the others. To be called where the batch is global: traced, outside shard_map.
    """
    B = len(self.mask_BT)
    first_2 = jnp.array([0, B], jnp.int32)
    labels_BT = jnp.arange(B, dtype=jnp.int32)[:, None] + first_2[None]
    rows_BT2 = jnp.broadcast_to(jnp.stack([first_2, first_2 + B], -1)[None], (B, 2, 2))
    return self.replace(labels_BT=labels_BT, rows_BT2=rows_BT2)


class Output(struct.PyTreeNode):
  """What a model says: the loss owns the unembedding, so there are no logits here.

  A position is a label to predict: of a classifier there is one, T = 1. A head's bias is a
  column of `head_VD` beside a 1 in `hidden_BTD` (layers.with_bias). If it is `paired`, the
  head is made of the batch itself, and Batch.paired says which of its rows are right.
  """

  hidden_BTD: jax.Array  # after the final norm
  head_VD: jax.Array  # the unembedding, as it is multiplied: logits = hidden @ head.T
  soft_cap: float | None = struct.field(pytree_node=False, default=None)  # see head.soft_cap
  taps_PBTD: jax.Array | None = None  # residual stream after each layer asked for
  embedding_BTD: jax.Array | None = None  # what stands for a position's whole input, to compare
  paired: bool = struct.field(pytree_node=False, default=False)
  aux: dict[str, Any] = struct.field(default_factory=dict)


class Mean(struct.PyTreeNode):
  """A total and a count: the only metric and loss type. Merges by addition."""

  total: jax.Array
  count: jax.Array

  @classmethod
  def of(cls, x_BT: jax.Array, mask_BT: jax.Array) -> Mean:
    """Sums where the mask is set. `where`, not `*`: NaN in padding is harmless."""
    x_BT = jnp.where(mask_BT, x_BT.astype(jnp.float32), 0.0)
    return cls(jnp.sum(x_BT), jnp.sum(mask_BT, dtype=jnp.float32))

  def __add__(self, other: Mean) -> Mean:
    return Mean(self.total + other.total, self.count + other.count)

  def value(self) -> jax.Array:
    """The mean; 0 when nothing was counted."""
    return self.total / jnp.maximum(self.count, 1.0)


class TrainState(struct.PyTreeNode):
  """All that training changes. `adapters` belong to losses and are never exported."""

  step: jax.Array  # int32
  params: Any  # the student, an nnx.Module
  adapters: dict[str, Any]
  opt: Any
  balance: dict[str, jax.Array] = struct.field(default_factory=dict)  # factors of loss weights
