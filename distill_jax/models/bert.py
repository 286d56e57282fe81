"""BERT and MiniLM (arXiv:1810.04805): texts to classes, or to embeddings."""

from __future__ import annotations

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.errors import check_choice
from distill_jax.models import _encoder
from distill_jax.models._declare import Declare
from distill_jax.models._family import check_supported
from distill_jax.nn import layers, sharding
from distill_jax.nn.params import param, stack, take_layer
from distill_jax.types import QKV, Inputs, JsonObject, Output

HF_MODEL_TYPES = ("bert",)  # model_type in config.json
POOLINGS = ("mean", "cls")
PREFIX = "bert."  # of all tensors except the head's; absent in checkpoints without a head
SUPPORTED_VALUES = {
  "position_embedding_type": "absolute",
  "is_decoder": False,
  "add_cross_attention": False,
}


@dataclasses.dataclass(frozen=True)
class Config(_encoder.Config):
  """A model's architecture, under Hugging Face's field names. Dropout is 0.

  With `num_labels` 0 it is a BertModel, whose output is one embedding per text, normalised to
  length 1, as in sentence-transformers: the last layer's output at the first token if `pooling`
  is "cls", else its mean over tokens.
  """

  vocab_size: int = 30_522
  max_position_embeddings: int = 512
  type_vocab_size: int = 2
  num_labels: int = 2
  pooling: str = "mean"

  OPTIONAL_ZERO = ("num_labels",)

  def __post_init__(self):
    super().__post_init__()
    check_choice("pooling", self.pooling, POOLINGS, "Use another model")

  @classmethod
  def from_hf(cls, hf: JsonObject) -> Self:
    """Returns the config for a Hugging Face config.json; unsupported values raise InputError."""
    check_supported(hf, SUPPORTED_VALUES, "bert")
    names = {f.name for f in dataclasses.fields(cls)} - {"num_labels"}
    labels = 0 if hf.get("architectures") == ["BertModel"] else _encoder.num_labels_of(hf)
    return cls(**{name: hf[name] for name in names if name in hf}, num_labels=labels)

  def to_hf(self) -> JsonObject:
    """Returns the config.json of this model."""
    hf = dataclasses.asdict(self)
    n = hf.pop("num_labels")
    if self.pooling == "mean":
      del hf["pooling"]  # transformers does not have this key
    architecture = "BertForSequenceClassification" if n else "BertModel"
    return {
      "architectures": [architecture],
      "model_type": "bert",
      "attention_probs_dropout_prob": 0.0,
      "hidden_dropout_prob": 0.0,
      "initializer_range": 0.02,
      **SUPPORTED_VALUES,
      **_encoder.label_names(n),
      **hf,
    }

  def ignores_tensor(self, name: str) -> bool:
    """Returns whether a checkpoint may hold this tensor although the model does not use it."""
    return name.endswith("embeddings.position_ids") or name.startswith("cls.")

  @property
  def head_rows(self) -> int:
    return max(self.num_labels, 1)  # for embeddings, the head has one row

  @property
  def embedding_size(self) -> int:
    """Width of the embedding of a whole text."""
    return self.hidden_size


class Block(_encoder.Block):
  """One layer, with norms after attention and after the feed-forward."""

  PRE_NORM = False
  NAMES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "attn_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "mlp_norm": "output.LayerNorm",
  }


class Model(nnx.Module):
  """A text classifier: one text per row; its output has one position, the pooled first token."""

  def __init__(self, c: Config, key: jax.Array):
    keys, at, D = jax.random.split(key, 6), f"{PREFIX}embeddings.", c.hidden_size

    def table(key: jax.Array, rows: str, name: str) -> nnx.Param:
      return param(key, f"{rows} table:{D}", f"{at}{name}_embeddings.weight", init=0.02)

    self.config = c
    self.embed = table(keys[0], f"vocab:{c.vocab_size}", "word")
    self.places = table(keys[1], f"places:{c.max_position_embeddings}", "position")
    self.kinds = table(keys[2], f"places:{c.type_vocab_size}", "token_type")
    self.norm, self.norm_bias = Declare(keys[3], at).layer_norm("LayerNorm", D)
    block = functools.partial(Block, c, PREFIX + "encoder.layer.{layers}.")
    self.layers = stack(c.num_hidden_layers, block, keys[4])
    declare = Declare(keys[5], "")
    # The outputs are sharded over the logical axis "heads", like queries.
    self.pool = declare.linear(f"{PREFIX}pooler.dense", f"embed:{D} heads:{D}", "heads")
    self.pool_bias = declare.bias(f"{PREFIX}pooler.dense", D)
    if n := c.num_labels:
      self.head = declare.linear("classifier", f"classes:{n} embed:{D}", "classes", 0.02)
      self.head_bias = declare.bias("classifier", n)

  def __call__(
    self, inputs: Inputs, compute: layers.ComputeConfig, taps: tuple[int, ...] = ()
  ) -> Output:
    """Returns the model's Output with T = 1; see types.Model."""
    x_BSD, taps_PBSD = self.encode(inputs, compute, taps)
    # The embedding of sentence-transformers (arXiv:1908.10084).
    is_mean = self.config.pooling == "mean"
    mean_or_first_B1D = _mean(x_BSD, inputs.segments_BT > 0) if is_mean else x_BSD[:, :1]
    if not self.config.num_labels:
      unit_B1D = layers.unit(mean_or_first_B1D)
      no_head_1D = jnp.zeros_like(unit_B1D[0])
      return Output(unit_B1D, no_head_1D, taps_PBTD=taps_PBSD, embedding_BTD=mean_or_first_B1D)
    head, head_bias, pool, pool_bias = compute.cast_and_gather(
      (self.head, self.head_bias, self.pool, self.pool_bias)
    )
    pooled_B1D = jnp.tanh(x_BSD[:, :1] @ pool[...] + pool_bias[...][None, None])
    hidden_B1D, head_VD = layers.with_bias(pooled_B1D, head[...], head_bias[...])
    return Output(hidden_B1D, head_VD, taps_PBTD=taps_PBSD, embedding_BTD=mean_or_first_B1D)

  def encode(
    self, inputs: Inputs, compute: layers.ComputeConfig, taps: tuple[int, ...] = ()
  ) -> tuple[jax.Array, jax.Array | None]:
    """Returns the last layer's output [B, S, D], and the taps."""
    with jax.named_scope("embed"):
      x_BSD = compute.lookup(self.embed, inputs.tokens_BT)
      x_BSD = x_BSD + compute.lookup(self.places, inputs.positions_BT)
      x_BSD = x_BSD + compute.cast_and_gather(self.kinds)[...][:1][None]
      eps = self.config.layer_norm_eps
      x_BSD = layers.layer_norm(x_BSD, self.norm[...], self.norm_bias[...], eps)
      x_BSD = sharding.constrain(x_BSD, "batch seq embed", compute.rules)
    valid_BS = inputs.segments_BT > 0
    return layers.scan_layers(
      [self.layers], lambda layer, i, x: layer(x, valid_BS), x_BSD, taps, compute
    )

  def qkv(self, layer: int, x_BSD: jax.Array, inputs: Inputs, compute: layers.ComputeConfig) -> QKV:
    """Returns the queries, keys and values of one layer, given the output of the layer before."""
    del inputs
    return compute.cast_and_gather(take_layer(self.layers, layer)).qkv(x_BSD)


def _mean(x_BSD: jax.Array, valid_BS: jax.Array) -> jax.Array:
  """Returns the mean over the tokens of each text, [B, 1, D]."""
  x_BSD = jnp.where(valid_BS[..., None], x_BSD, 0)
  n_B11 = jnp.maximum(jnp.sum(valid_BS, 1), 1)[:, None, None]
  return jnp.sum(x_BSD, 1, keepdims=True) / n_B11.astype(x_BSD.dtype)


TINY = Config(
  hidden_size=32,
  intermediate_size=64,
  num_hidden_layers=3,
  num_attention_heads=4,
  vocab_size=256,
  max_position_embeddings=128,
)

CONFIGS = {
  "tiny": TINY,
  "minilm-l6": Config(
    hidden_size=384, intermediate_size=1_536, num_hidden_layers=6, num_attention_heads=12
  ),
  "bert-base": Config(
    hidden_size=768, intermediate_size=3_072, num_hidden_layers=12, num_attention_heads=12
  ),
}
