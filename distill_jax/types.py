"""What models, losses and the training step pass to each other, and the legend of shape letters.

Arrays carry their axes as a suffix, `x_BTD`, one letter an axis:

  B batch (sequences)      D model width           K entries of a stored distribution
  T positions (tokens)     V vocabulary            P tapped layers
  L layers                 H query heads           h width of one head
  G key/value heads        F feed-forward width    C positions of one chunk
  S source positions       Y, W height and width   M mel bins, or channels of an image
  N samples or points      E experts               R low rank (LoRA, latent attention)
  Q query heads per key/value head                 Z cache slots
  J beams                  U distinct layers of those that share weights
  A teachers               O output width of a linear map, I its input width
  X positions of all sequences in one axis         n chunks
  s devices that share the vocabulary              v rows of the head on one of them
  b blocks of the vocabulary                       t tokens of a block
  g groups of tokens or of experts                 f tokens of a group
  e experts of a group                             p side of a patch, in pixels
  k taps of a filter                               r rotated part of a head's width
  u part of it that is not rotated                 w width of one head's values

`_BT` is [batch, position], `_VD` the unembedding's rows, `_BYWM` images. A digit is an axis of
that size, as in `_BT1`. A module that uses a letter otherwise defines it where it is used. A
scalar has no suffix, and a temperature is `temperature`, never T.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from flax import struct

PyTree = Any  # of arrays, their shapes, or what is held for each
Tree = TypeVar("Tree")  # a PyTree of which a function returns another of the same structure
QKV = tuple[jax.Array, jax.Array, jax.Array]  # queries, keys, values
JsonObject = dict[str, Any]  # a parsed JSON object, or what is written as one
# A divergence: (log p, log q) -> its terms, elementwise over the last axis.
Terms = Callable[[jax.Array, jax.Array], jax.Array]
# Sentinel class count of contrastive tasks, whose "classes" are the other examples of the batch;
# larger than any batch.
IN_BATCH_CLASSES = 2**20


class Inputs(struct.PyTreeNode):
  """The inputs of a text model, all int32 [B, T].

  `segments_BT` numbers the documents packed into a row from 1; 0 is padding. Attention
  never crosses a segment, and positions start at 0 in each.
  """

  tokens_BT: jax.Array
  positions_BT: jax.Array
  segments_BT: jax.Array


class Images(struct.PyTreeNode):
  """The inputs of an image model: float32 [B, height, width, channels], normalised."""

  pixels_BYWM: jax.Array


class Sounds(struct.PyTreeNode):
  """The inputs of a speech model: log-mel frames, float32 [B, frames, bins]."""

  mel_BSM: jax.Array


class SourceTarget(struct.PyTreeNode):
  """The inputs of an encoder-decoder: the source, and the target shifted right."""

  source: Inputs | Sounds
  target: Inputs


class ImageText(struct.PyTreeNode):
  """The inputs of a model of images and texts, one text an image."""

  images: Images
  texts: Inputs


ModelInputs = Inputs | Images | Sounds | SourceTarget | ImageText


class Targets(struct.PyTreeNode, kw_only=True):
  """A teacher's outputs at each position: one of the three kinds in losses/supports.py.

  Attributes:
    entropy_BT: float32, nats.
    label_logp_BT: float32, nats: log p(label).
    argmax_BT: int32: the most probable token.
    taps_BPTD: features of tapped layers.
    head_VD: of an online teacher alone, and the one array without positions.
    temperature: of the distribution that the arrays are of.
  """

  entropy_BT: jax.Array | None = None
  label_logp_BT: jax.Array | None = None
  argmax_BT: jax.Array | None = None
  taps_BPTD: jax.Array | None = None
  head_VD: jax.Array | None = None
  temperature: float = struct.field(pytree_node=False, default=1.0)

  def divergence(
    self, terms: Terms, logits_BCV: jax.Array, temperature: jax.Array | float
  ) -> jax.Array:
    """The divergence of the student's logits from these targets, float32 [B, C].

    Args:
      terms: see losses/divergences.py.
      logits_BCV: the student's, of the chunk of positions that these targets are of.
      temperature: at which both are compared.
    """
    raise NotImplementedError

  def forward_kl(self, logits_BCV: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """KL(p || q), float32 [B, C]: the divergence that most targets serve."""
    raise NotImplementedError

  def label_logp(self, logits_BCV: jax.Array, labels_BC: jax.Array) -> jax.Array | None:
    """log p(label) [B, C] at the recorded temperature; None where it is not recorded."""
    del logits_BCV, labels_BC
    return self.label_logp_BT

  def entropy(self, logits_BCV: jax.Array) -> jax.Array | None:
    """H(p) [B, C] in nats at the recorded temperature; None where it is not recorded."""
    del logits_BCV
    return self.entropy_BT

  def argmax(self, logits_BCV: jax.Array) -> jax.Array | None:
    """The most probable token, int32 [B, C]; None where it is not recorded."""
    del logits_BCV
    return self.argmax_BT

  def present(self) -> jax.Array | None:
    """Positions that the teacher has read, bool [B, C]; None for all."""
    return None


@dataclasses.dataclass(frozen=True)
class Recorded:
  """How the recorded targets of a batch were made, from the store's manifest.

  Attributes:
    temperature: of the recorded distribution.
    missing_mass: the convention for the mass outside top-k records.
    taps: the layers whose features are recorded, in order; `tap_kind` is "hidden" or "qkv".
  """

  temperature: float = 1.0
  missing_mass: str = "tail_bucket"
  taps: tuple[int, ...] = ()
  tap_kind: str = "hidden"


class Batch(struct.PyTreeNode):
  """One global training batch.

  Attributes:
    inputs: the model's inputs, of the type that its family reads.
    labels_BT: int32 [B, T], the correct token or class.
    mask_BT: bool [B, T], the only mask: the labels that are trained on.
    targets: the teachers' outputs, by teacher.
    smoothing_BT: float32 [B, T], 1 minus the confidence in each label; None for full confidence.
    class_range_BT2: int32 [B, T, 2], the rows [first, past) of the head among which a position
      chooses; None for all of them.
    valid_BS: for encoders, whose features are per input position and not per label: bool [B, S],
      True at positions that are not padding ([B, 1] if there is no padding).
    distill_token_BT: for students with a distillation token (models/deit.py): bool [B, T], True
      where a position is trained on teachers only, and False where on labels only.
  """

  inputs: ModelInputs
  labels_BT: jax.Array
  mask_BT: jax.Array
  targets: dict[str, Targets] = struct.field(default_factory=dict)
  smoothing_BT: jax.Array | None = None
  class_range_BT2: jax.Array | None = None
  valid_BS: jax.Array | None = None
  distill_token_BT: jax.Array | None = None

  def mask_for_teacher_losses(self) -> jax.Array:
    """Positions, bool [B, T], over which losses and metrics against teachers are taken."""
    if self.distill_token_BT is None:
      return self.mask_BT
    return self.mask_BT & self.distill_token_BT

  def mask_for_label_losses(self) -> jax.Array:
    """Positions, bool [B, T], over which losses and metrics against labels are taken."""
    if self.distill_token_BT is None:
      return self.mask_BT
    return self.mask_BT & ~self.distill_token_BT

  def with_contrastive_labels(self) -> Batch:
    """The batch labelled for a head that is made of it: B texts, then their B images.

    Position 0 of row i, its image, chooses row i of the first B, position 1, its text, row
    B + i of the others. Call it where the batch is global: traced, outside shard_map.
    """
    B = len(self.mask_BT)
    first_2 = jnp.array([0, B], jnp.int32)
    labels_BT = jnp.arange(B, dtype=jnp.int32)[:, None] + first_2[None]
    range_BT2 = jnp.broadcast_to(jnp.stack([first_2, first_2 + B], -1)[None], (B, 2, 2))
    return self.replace(labels_BT=labels_BT, class_range_BT2=range_BT2)


class Output(struct.PyTreeNode):
  """A model's outputs, without logits: those are made from it by the fused head.

  A position is a label to predict; a classifier has one, T = 1. A head's bias is a column of
  `head_VD` beside a 1 in `hidden_BTD` (layers.with_bias).

  Attributes:
    hidden_BTD: [B, T, D], after the final norm.
    head_VD: [V, D], the unembedding as it is multiplied: logits = hidden @ head.T.
    soft_cap: of the logits; see fused_head.soft_cap.
    taps_PBTD: the residual stream after each layer that was asked for.
    embedding_BTD: of each position's whole input (an image, a text), where a family has it.
    contrastive: the head is made of the batch itself; Batch.with_contrastive_labels names the
      correct rows.
  """

  hidden_BTD: jax.Array
  head_VD: jax.Array
  soft_cap: float | None = struct.field(pytree_node=False, default=None)
  taps_PBTD: jax.Array | None = None
  embedding_BTD: jax.Array | None = None
  contrastive: bool = struct.field(pytree_node=False, default=False)


@runtime_checkable
class FamilyConfig(Protocol):
  """The shape of a model, under the names of Hugging Face's config.json: a frozen dataclass."""

  @property
  def hidden_size(self) -> int:
    """Width of the hidden states that features are taken from."""

  @property
  def num_hidden_layers(self) -> int:
    """How many layers taps are chosen from."""

  @property
  def head_rows(self) -> int:
    """How many outcomes the model's head tells apart: tokens of a vocabulary, or classes."""

  @property
  def embedding_size(self) -> int | None:
    """Width of Output.embedding_BTD, the embeddings of whole inputs; None without them."""

  @property
  def tied_table(self) -> str | None:
    """The tensor of the embedding table that is the head too; None where the head is its own."""

  @classmethod
  def from_hf(cls, hf: JsonObject) -> Self:
    """Reads a Hugging Face config.json; what the family cannot do is refused by name."""

  def to_hf(self) -> JsonObject:
    """Returns the config.json of the model."""

  def keep_layers(self, kept: tuple[int, ...]) -> Self:
    """Returns the config of a model that has these layers of this one, in this order."""

  def ignores_tensor(self, name: str) -> bool:
    """Whether a checkpoint may hold this tensor although the model has no use for it."""


class TextConfig(FamilyConfig, Protocol):
  """The config of a model that reads text."""

  @property
  def vocab_size(self) -> int:
    """Rows of the embedding table."""

  @property
  def max_position_embeddings(self) -> int:
    """How many positions the model reads at most."""


class Model(Protocol):
  """A family's model: its parameters, and how its outputs are computed from its inputs."""

  config: FamilyConfig

  def __call__(self, inputs: ModelInputs, compute: Any, taps: tuple[int, ...] = ()) -> Output:
    """The outputs.

    Args:
      inputs: of the type that the family reads; see Batch.
      compute: an nn.layers.ComputeConfig.
      taps: layers whose outputs are kept beside, in ascending order.
    """

  def qkv(self, layer: int, x_BTD: jax.Array, inputs: ModelInputs, compute: Any) -> QKV:
    """(q, k, v) of a layer, each [B, T, heads, h], from the output of the layer before it."""


class Mean(struct.PyTreeNode):
  """A total and a count: the type of every metric and loss. Added, they are of both parts."""

  total: jax.Array
  count: jax.Array

  @classmethod
  def of(cls, x_BT: jax.Array, mask_BT: jax.Array) -> Mean:
    """Sums `x_BT` where the mask is set. `where`, not `*`: NaN in padding is harmless."""
    x_BT = jnp.where(mask_BT, x_BT.astype(jnp.float32), 0.0)
    return cls(jnp.sum(x_BT), jnp.sum(mask_BT, dtype=jnp.float32))

  def __add__(self, other: Mean) -> Mean:
    return Mean(self.total + other.total, self.count + other.count)

  def value(self) -> jax.Array:
    """The mean; 0 when nothing was counted."""
    return self.total / jnp.maximum(self.count, 1.0)


class TrainState(struct.PyTreeNode):
  """All that training changes."""

  step: jax.Array  # int32
  params: PyTree  # what is trained of the student: see models/trainables.py
  adapters: dict[str, PyTree]  # parameters that losses own, by loss; never exported
  opt: optax.OptState
  balance: dict[str, jax.Array] = struct.field(default_factory=dict)  # factors of loss weights
