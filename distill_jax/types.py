"""The types that models, losses and the training step exchange, and the letters of array shapes.

The name of an array ends in its axes, one letter each, e.g. `x_BTD`:

  B batch (sequences)      D model width           K entries of a stored distribution
  T positions (tokens)     V vocabulary            P tapped layers
  L layers                 H query heads           h width of one head
  G key/value heads        F feed-forward width    C positions of one chunk
  S source positions       Y, W height and width   M mel bins, or channels of an image
  N samples or points      E experts               R rank (LoRA, latent attention)
  Q query heads per key/value head                 Z cache slots
  J beams                  U distinct layers if layers share weights
  A teachers               O output width of a linear map, I its input width
  X positions of all sequences in one axis         n chunks
  s devices whose parts are summed                 v rows of the head on one device
  b blocks of the vocabulary                       t tokens of a block
  g groups of tokens or of experts                 f tokens of a group
  e experts of a group                             p side of a patch, in pixels
  k width of a convolution                         r rotated part of a head's width
  u unrotated part of a head's width               w width of one head's values

For example, `_BT` is [batch, position], `_VD` an unembedding, and `_BYWM` a batch of images. A
digit is an axis of that size, e.g. `_BT1`. A module that uses a letter with another meaning defines
it there. Scalars have no suffix. A temperature is called `temperature`, never T.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from distill_jax.errors import bad_value

PyTree = Any  # a tree of arrays, or of a value for each array, such as its shape or sharding
Tree = TypeVar("Tree")  # a PyTree; the function returns one of the same structure
QKV = tuple[jax.Array, jax.Array, jax.Array]  # queries, keys, values
JsonObject = dict[str, Any]  # a parsed JSON object, or a dict to write as one
Terms = Callable[[jax.Array, jax.Array], jax.Array]  # (log p, log q) -> a divergence's terms
IN_BATCH_CLASSES = 2**20  # class count of contrastive tasks: above the size of any batch


class Inputs(struct.PyTreeNode):
  """The inputs of a text model, all int32 [B, T].

  `segments_BT` numbers the documents packed into a row from 1; 0 is padding. Attention does not
  cross segments, and positions start at 0 in each segment.
  """

  tokens_BT: jax.Array
  positions_BT: jax.Array
  segments_BT: jax.Array

  @classmethod
  def of(cls, tokens_BT: Any, segments_BT: Any = None) -> Inputs:
    """Returns inputs with positions from 0 in each segment; by default, a row is one segment."""
    xp: Any = jnp if isinstance(tokens_BT, jax.Array) else np
    tokens_BT = xp.asarray(tokens_BT, np.int32)
    segments_BT = tokens_BT * 0 + 1 if segments_BT is None else xp.asarray(segments_BT, np.int32)
    t_BT = xp.cumsum(xp.ones_like(tokens_BT), axis=1) - 1
    starts_BT = xp.where(segments_BT[:, 1:] != segments_BT[:, :-1], t_BT[:, 1:], 0)
    starts_BT = xp.pad(starts_BT, ((0, 0), (1, 0)))
    positions_BT = t_BT - xp.maximum.accumulate(starts_BT, axis=1)
    return cls(tokens_BT, positions_BT.astype(np.int32), segments_BT)


class Images(struct.PyTreeNode):
  """The inputs of an image model: float32 [B, height, width, channels], normalised."""

  pixels_BYWM: jax.Array


class Sounds(struct.PyTreeNode):
  """The inputs of a speech model: log-mel frames, float32 [B, frames, bins]."""

  mel_BSM: jax.Array


class SourceTarget(struct.PyTreeNode):
  """The inputs of an encoder-decoder: the source, and the target shifted right by one."""

  source: Inputs | Sounds
  target: Inputs


class ImageText(struct.PyTreeNode):
  """The inputs of a model of images and texts: one text for each image."""

  images: Images
  texts: Inputs


ModelInputs = Inputs | Images | Sounds | SourceTarget | ImageText


class Targets(struct.PyTreeNode, kw_only=True):
  """A teacher's outputs at each position: the base class of the kinds in losses/targets.py.

  Attributes:
    entropy_BT: float32, the entropy in nats.
    label_logp_BT: float32, log p(label) in nats.
    argmax_BT: int32, the most probable token.
    taps_BPTD: features of the tapped layers.
    head_VD: the unembedding of an online teacher, or a tree with it; no axis of positions.
    temperature: the temperature of the stored distribution.
  """

  entropy_BT: jax.Array | None = None
  label_logp_BT: jax.Array | None = None
  argmax_BT: jax.Array | None = None
  taps_BPTD: jax.Array | None = None
  head_VD: PyTree = None
  temperature: float = struct.field(pytree_node=False, default=1.0)

  def with_logits(self) -> Self:
    """Returns the targets with the logits of an online teacher, other targets unchanged."""
    return self

  def divergence(
    self, terms: Terms, logits_BCV: jax.Array, temperature: jax.Array | float
  ) -> jax.Array:
    """Returns a divergence of teacher and student at the temperature, float32 [B, C]."""
    raise NotImplementedError

  def forward_kl(self, logits_BCV: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """Returns KL(teacher || student), float32 [B, C], the divergence that most kinds support."""
    raise NotImplementedError

  def label_logp(self, logits_BCV: jax.Array, labels_BC: jax.Array) -> jax.Array | None:
    """Returns log p(label) [B, C] at the recorded temperature; None if it is not recorded."""
    del logits_BCV, labels_BC
    return self.label_logp_BT

  def entropy(self, logits_BCV: jax.Array) -> jax.Array | None:
    """Returns the entropy [B, C] in nats at the recorded temperature; None if not recorded."""
    del logits_BCV
    return self.entropy_BT

  def argmax(self, logits_BCV: jax.Array) -> jax.Array | None:
    """Returns the most probable token, int32 [B, C]; None if it is not recorded."""
    del logits_BCV
    return self.argmax_BT

  def present(self) -> jax.Array | None:
    """Returns a mask of the positions with targets, bool [B, C]; None if all have them."""
    return None


@dataclasses.dataclass(frozen=True)
class Recorded:
  """Properties of the recorded targets of a batch, from the store's manifest.

  Attributes:
    temperature: the temperature of the recorded distribution.
    missing_mass: the convention for the probability mass outside top-k records.
    taps: the layers whose features are recorded, in order; `tap_kind` is "hidden" or "qkv".
  """

  temperature: float = 1.0
  missing_mass: str = "tail_bucket"
  taps: tuple[int, ...] = ()
  tap_kind: str = "hidden"


class Rollout(struct.PyTreeNode):
  """Numbers of the texts of a batch that a student wrote.

  Attributes:
    behaviour_logp_BT: float32, log q(label) at temperature 1 of the student that sampled the label.
    reward_BT: float32, the reward of the text, equal at all its positions; None without one.
  """

  behaviour_logp_BT: jax.Array
  reward_BT: jax.Array | None = None


class Batch(struct.PyTreeNode):
  """One global training batch.

  Attributes:
    inputs: the model's inputs, of the type for its family; None if only losses are computed.
    labels_BT: int32 [B, T], the correct token or class.
    mask_BT: bool [B, T], True at labels that are trained on.
    targets: the teachers' outputs, by teacher.
    smoothing_BT: float32 [B, T], 1 minus the confidence in each label; None for full confidence.
    class_range_BT2: int32 [B, T, 2], the rows [first, past) of the head that are a position's
      classes; None for all rows.
    valid_BS: for encoders, whose features are per input position and not per label: bool [B, S],
      True at positions that are not padding ([B, 1] if a batch never has padding).
    distill_token_BT: for students with a distillation token (models/deit.py): bool [B, T], True
      where a position is trained on teachers only, False where it is trained on labels only.
    rollout: for texts that a student wrote; None for others.
  """

  inputs: ModelInputs | None
  labels_BT: jax.Array
  mask_BT: jax.Array
  targets: dict[str, Targets] = struct.field(default_factory=dict)
  smoothing_BT: jax.Array | None = None
  class_range_BT2: jax.Array | None = None
  valid_BS: jax.Array | None = None
  distill_token_BT: jax.Array | None = None
  rollout: Rollout | None = None

  @property
  def model_inputs(self) -> ModelInputs:
    """The model's inputs; a batch without them raises InputError."""
    if self.inputs is None:
      raise bad_value("Batch.inputs", None, "a model's inputs", "Make the batch with them")
    return self.inputs

  def mask_for_teacher_losses(self) -> jax.Array:
    """Returns the positions, bool [B, T], for losses and metrics against teachers."""
    if self.distill_token_BT is None:
      return self.mask_BT
    return self.mask_BT & self.distill_token_BT

  def mask_for_label_losses(self) -> jax.Array:
    """Returns the positions, bool [B, T], for losses and metrics against labels."""
    if self.distill_token_BT is None:
      return self.mask_BT
    return self.mask_BT & ~self.distill_token_BT

  def with_contrastive_labels(self) -> Batch:
    """Returns the batch with labels for a contrastive head: rows for B texts, then for B images.

    Position 0 of row i, its image, has label i among the first B rows of the head; position 1, its
    text, has label B + i among the others. The batch must be global, i.e. not in shard_map.
    """
    B = len(self.mask_BT)
    first_2 = jnp.array([0, B], jnp.int32)
    labels_BT = jnp.arange(B, dtype=jnp.int32)[:, None] + first_2[None]
    range_BT2 = jnp.broadcast_to(jnp.stack([first_2, first_2 + B], -1)[None], (B, 2, 2))
    return self.replace(labels_BT=labels_BT, class_range_BT2=range_BT2)


class Output(struct.PyTreeNode):
  """A model's outputs before the logits, which the fused head computes from them.

  Each position predicts one label; a classifier has T = 1. The bias of a head is a column of
  `head_VD`, multiplied by a 1 in `hidden_BTD` (layers.with_bias).

  Attributes:
    hidden_BTD: [B, T, D], after the final norm.
    head_VD: [V, D], the unembedding: logits = hidden @ head.T.
    soft_cap: the soft cap of the logits; see fused_head.soft_cap.
    taps_PBTD: the residual stream after each tapped layer.
    embedding_BTD: the embedding of each position's whole image or text, if the family has one.
    contrastive: whether the head's rows are the batch's examples; see with_contrastive_labels.
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
    """Width of the hidden states, and of features."""

  @property
  def num_hidden_layers(self) -> int:
    """Number of layers that can be tapped."""

  @property
  def head_rows(self) -> int:
    """Number of outcomes that the head predicts: tokens of a vocabulary, or classes."""

  @property
  def embedding_size(self) -> int | None:
    """Width of Output.embedding_BTD; None if the model does not compute it."""

  @property
  def tied_table(self) -> str | None:
    """Name of the embedding table if it is also the head; None if the head is a separate tensor."""

  @classmethod
  def from_hf(cls, hf: JsonObject) -> Self:
    """Returns the config for a Hugging Face config.json; unsupported values raise InputError."""

  def to_hf(self) -> JsonObject:
    """Returns the config.json of the model."""

  def keep_layers(self, kept: tuple[int, ...]) -> Self:
    """Returns the config of a model with only these layers, in this order."""

  def ignores_tensor(self, name: str) -> bool:
    """Returns whether a checkpoint may hold this tensor although the model does not use it."""


class TextConfig(FamilyConfig, Protocol):
  """The config of a model that reads text."""

  @property
  def vocab_size(self) -> int:
    """Rows of the embedding table."""

  @property
  def max_position_embeddings(self) -> int:
    """Maximum number of positions."""


class Model(Protocol):
  """A family's model: its parameters, and the function from inputs to outputs."""

  config: FamilyConfig

  def __call__(self, inputs: ModelInputs, compute: Any, taps: tuple[int, ...] = ()) -> Output:
    """Returns the outputs.

    Args:
      inputs: the inputs, of the type for the family; see Batch.
      compute: the settings of the computation, an nn.layers.ComputeConfig.
      taps: the layers whose outputs are also returned, in ascending order.
    """

  def qkv(self, layer: int, x_BTD: jax.Array, inputs: ModelInputs, compute: Any) -> QKV:
    """Returns (q, k, v) of a layer, each [B, T, heads, h], for the output of the layer before."""


class Mean(struct.PyTreeNode):
  """A total and a count, the type of every metric and loss. The sum of two covers both."""

  total: jax.Array
  count: jax.Array

  @classmethod
  def of(cls, x_BT: jax.Array, mask_BT: jax.Array) -> Mean:
    """Sums `x_BT` where the mask is True. NaN is allowed elsewhere."""
    x_BT = jnp.where(mask_BT, x_BT.astype(jnp.float32), 0.0)
    return cls(jnp.sum(x_BT), jnp.sum(mask_BT, dtype=jnp.float32))

  def __add__(self, other: Mean) -> Mean:
    return Mean(self.total + other.total, self.count + other.count)

  def value(self) -> jax.Array:
    """Returns the mean, or 0 if the count is 0."""
    return self.total / jnp.maximum(self.count, 1.0)
