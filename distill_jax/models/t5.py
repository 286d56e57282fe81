"""T5 v1.1 and Flan-T5 (arXiv:1910.10683, arXiv:2002.05202): text to text.

Relative positions are a bias of the attention scores, which are not scaled. Norms are RMS norms,
linear layers have no bias, and the feed-forward is gated.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distill_jax.errors import bad_value
from distill_jax.models import _seq2seq
from distill_jax.models._declare import Declare
from distill_jax.models._encoder import heads_of
from distill_jax.models._family import check_numbers, check_supported
from distill_jax.nn import attention, layers, sharding
from distill_jax.nn.params import ENCODER_LAYERS, param, stack
from distill_jax.nn.products import product
from distill_jax.types import QKV, Inputs, JsonObject, Output

HF_MODEL_TYPES = ("t5",)  # model_type in config.json
SUPPORTED_VALUES = {"feed_forward_proj": "gated-gelu", "is_encoder_decoder": True}


@dataclasses.dataclass(frozen=True)
class Config(_seq2seq.DecoderSizes):
  """A model's architecture, under Hugging Face's field names. Dropout is 0."""

  d_kv: int
  d_ff: int
  num_layers: int
  num_decoder_layers: int
  num_heads: int
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  layer_norm_epsilon: float = 1e-6
  tie_word_embeddings: bool = False  # as in T5 v1.0: also scales outputs by 1/sqrt(d_model)
  pad_token_id: int = 0
  eos_token_id: int = 1
  decoder_start_token_id: int = 0

  DECODER_LAYERS: ClassVar[str] = "num_decoder_layers"

  def __post_init__(self):
    check_numbers(self, self.OPTIONAL_ZERO)
    n, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
    action = "Correct the model's config"
    if n % 4:
      raise bad_value("relative_attention_num_buckets", n, "a multiple of 4", action)
    if distance <= n // 2:
      expected = f"more than {n // 2}, half of relative_attention_num_buckets"
      raise bad_value("relative_attention_max_distance", distance, expected, action)

  @classmethod
  def from_hf(cls, hf: JsonObject) -> Self:
    """Returns the config for a Hugging Face config.json; unsupported values raise InputError."""
    check_supported(hf, SUPPORTED_VALUES, "t5", required=True)
    # transformers 5 ties embeddings if a checkpoint lacks a head; scale_decoder_outputs has the
    # value that older versions call tie_word_embeddings.
    tied: Any = hf.get("scale_decoder_outputs", hf.get("tie_word_embeddings", True))
    names = {f.name for f in dataclasses.fields(cls)} - {"tie_word_embeddings"}
    values = {name: hf[name] for name in names if hf.get(name) is not None}
    values.setdefault("num_decoder_layers", hf["num_layers"])
    return cls(**values, tie_word_embeddings=tied)

  def to_hf(self) -> JsonObject:
    """Returns the config.json of this model."""
    return {
      "architectures": ["T5ForConditionalGeneration"],
      "model_type": "t5",
      **SUPPORTED_VALUES,
      **dataclasses.asdict(self),
      "dropout_rate": 0.0,
      "use_cache": True,
    }

  def ignores_tensor(self, name: str) -> bool:
    """Returns whether a checkpoint may hold this tensor although the model does not use it."""
    # Copies of the shared table.
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    return name in copies or name.endswith("layer.1.EncDecAttention.relative_attention_bias.weight")

  @property
  def tied_table(self) -> str | None:
    return "shared.weight" if self.tie_word_embeddings else None

  @property
  def num_attention_heads(self) -> int:
    return self.num_heads

  @property
  def head_dim(self) -> int:
    return self.d_kv


def declare_heads(declare: Declare, c: Config, module: str) -> nnx.Param:
  """Declares a projection to heads. Queries start small because scores are not scaled."""
  init = (c.d_model * c.d_kv) ** -0.5 if module.endswith("q") else "fan_in"
  dims = f"embed:{c.d_model} heads:{c.num_heads} head_dim:{c.d_kv}"
  return declare.linear(module, dims, "heads head_dim", init)


def declare_output(declare: Declare, c: Config, module: str) -> nnx.Param:
  """Declares the projection of heads to the residual."""
  dims = f"heads:{c.num_heads} head_dim:{c.d_kv} embed:{c.d_model}"
  return declare.linear(module, dims, "embed")


def project_heads(a_BTHh: jax.Array, weight: nnx.Param) -> jax.Array:
  """Returns the update of the residual by attention, given the output of its heads."""
  return product(a_BTHh, weight[...], 2)


class EncoderLayer(nnx.Module):
  """One layer: attention, then feed-forward, each with a norm before it and a residual."""

  MLP = 1  # index of the feed-forward among the parts of a layer

  def __init__(self, c: Config, prefix: str, key: jax.Array):
    keys = jax.random.split(key, 2)
    self.config = c
    declare = Declare(keys[0], f"{prefix}layer.0.")
    self.attn_norm = declare.rms_norm("layer_norm", c.d_model)
    self.q, self.k, self.v = (declare_heads(declare, c, f"SelfAttention.{n}") for n in "qkv")
    self.o = declare_output(declare, c, "SelfAttention.o")
    declare = Declare(keys[1], f"{prefix}layer.{self.MLP}.")
    self.mlp_norm = declare.rms_norm("layer_norm", c.d_model)
    up, down = f"embed:{c.d_model} mlp:{c.d_ff}", f"mlp:{c.d_ff} embed:{c.d_model}"
    self.gate = declare.linear("DenseReluDense.wi_0", up, "mlp")
    self.up = declare.linear("DenseReluDense.wi_1", up, "mlp")
    self.down = declare.linear("DenseReluDense.wo", down, "embed")

  def norm(self, x_BTD: jax.Array, scale: nnx.Param) -> jax.Array:
    return layers.rms_norm(x_BTD, scale[...], self.config.layer_norm_epsilon)

  def qkv(self, x_BTD: jax.Array) -> QKV:
    y_BTD = self.norm(x_BTD, self.attn_norm)
    return heads_of(y_BTD, self.q), heads_of(y_BTD, self.k), heads_of(y_BTD, self.v)

  def attention_residual(self, x_BTD: jax.Array, a_BTHh: jax.Array) -> jax.Array:
    return x_BTD + project_heads(a_BTHh, self.o)

  def feed_forward_block(self, x_BTD: jax.Array) -> jax.Array:
    y_BTD = self.norm(x_BTD, self.mlp_norm)
    weights = self.gate[...], self.up[...], self.down[...]
    return x_BTD + layers.gated_mlp(y_BTD, *weights, jax.nn.gelu)

  def __call__(self, x_BSD: jax.Array, valid_BS: jax.Array, bias_1HSS: jax.Array) -> jax.Array:
    with jax.named_scope("attention"):
      a_BSHh = attention.full(*self.qkv(x_BSD), valid_BS, scale=1.0, bias_BHTS=bias_1HSS)
      x_BSD = self.attention_residual(x_BSD, a_BSHh)
    with jax.named_scope("mlp"):
      return self.feed_forward_block(x_BSD)


class DecoderLayer(_seq2seq.DecoderLayer, EncoderLayer):  # type: ignore[misc]  # other arguments
  """An encoder layer with attention to the source added before the feed-forward."""

  SCALE = 1.0
  MLP = 2

  qkv = EncoderLayer.qkv
  attention_residual = EncoderLayer.attention_residual
  feed_forward_block = EncoderLayer.feed_forward_block

  def __init__(self, c: Config, prefix: str, key: jax.Array):
    EncoderLayer.__init__(self, c, prefix, key)
    declare = Declare(jax.random.fold_in(key, 1), f"{prefix}layer.1.")
    self.source_norm = declare.rms_norm("layer_norm", c.d_model)
    self.source_wq, self.source_wk, self.source_wv = (
      declare_heads(declare, c, f"EncDecAttention.{n}") for n in "qkv"
    )
    self.source_o = declare_output(declare, c, "EncDecAttention.o")

  def source_q(self, x_BTD: jax.Array) -> jax.Array:
    return heads_of(self.norm(x_BTD, self.source_norm), self.source_wq)

  def source_kv(self, memory_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
    return heads_of(memory_BSD, self.source_wk), heads_of(memory_BSD, self.source_wv)

  def source_attention_residual(self, x_BTD: jax.Array, a_BTHh: jax.Array) -> jax.Array:
    return x_BTD + project_heads(a_BTHh, self.source_o)


class Model(_seq2seq.Model):
  """An encoder-decoder: source and target tokens to hidden states of the target."""

  def __init__(self, c: Config, key: jax.Array):
    keys, V, D, H = jax.random.split(key, 8), c.vocab_size, c.d_model, c.num_heads
    self.config = c
    self.embed = param(keys[0], f"vocab:{V} table:{D}", "shared.weight", "vocab", init=1.0)
    dims = f"places:{c.relative_attention_num_buckets} heads:{H}"
    table = "{}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    self.encoder_near = param(keys[1], dims, table.format("encoder"), init=D**-0.5)
    self.near = param(keys[2], dims, table.format("decoder"), init=D**-0.5)
    encoder_layer = functools.partial(EncoderLayer, c, "encoder.block.{encoder_layers}.")
    self.encoder = stack(c.num_layers, encoder_layer, keys[3], axis=ENCODER_LAYERS)
    decoder_layer = functools.partial(DecoderLayer, c, "decoder.block.{layers}.")
    self.layers = stack(c.num_decoder_layers, decoder_layer, keys[4])
    self.encoder_norm = Declare(keys[5], "encoder.").rms_norm("final_layer_norm", D)
    self.norm = Declare(keys[6], "decoder.").rms_norm("final_layer_norm", D)
    if not c.tie_word_embeddings:
      self.head = param(keys[7], f"vocab:{V} embed:{D}", "lm_head.weight", "vocab")

  def encode(self, source: Inputs, compute: layers.ComputeConfig) -> tuple[jax.Array, jax.Array]:
    """Returns the encoder's output [B, S, D], and a mask of positions that are not padding."""
    valid_BS, S = source.segments_BT > 0, source.tokens_BT.shape[1]
    bias_1HSS = self._bias(self.encoder_near, S, both_ways=True, compute=compute)
    x_BSD = self.embed_tokens(source.tokens_BT, source.positions_BT, compute)
    x_BSD = sharding.constrain(x_BSD, "batch seq embed", compute.rules)
    x_BSD, _ = layers.scan_layers(
      [self.encoder], lambda layer, i, x: layer(x, valid_BS, bias_1HSS), x_BSD, (), compute
    )
    return layers.rms_norm(x_BSD, self.encoder_norm[...], self.config.layer_norm_epsilon), valid_BS

  def embed_tokens(
    self, tokens_BT: jax.Array, positions_BT: jax.Array, compute: layers.ComputeConfig
  ):
    del positions_BT  # the bias of the scores contains them
    with jax.named_scope("embed"):
      return compute.lookup(self.embed, tokens_BT)

  def target_bias(self, T: int, compute: layers.ComputeConfig) -> jax.Array:
    return self._bias(self.near, T, both_ways=False, compute=compute)

  def _bias(
    self, near: nnx.Param, T: int, both_ways: bool, compute: layers.ComputeConfig
  ) -> jax.Array:
    """Returns the bias of attention scores, [1, H, T, T], from a table of buckets."""
    c = self.config
    buckets = relative_buckets(
      T, both_ways, c.relative_attention_num_buckets, c.relative_attention_max_distance
    )
    near_OH = compute.cast_and_gather(near)[...].astype(jnp.float32)  # the dtype of its gradient
    return near_OH[buckets].astype(compute.dtype).transpose(2, 0, 1)[None]

  def output(self, x_BTD: jax.Array, compute: layers.ComputeConfig, taps_PBTD) -> Output:
    c = self.config
    x_BTD = layers.rms_norm(x_BTD, self.norm[...], c.layer_norm_epsilon)
    if not c.tie_word_embeddings:
      return Output(x_BTD, compute.cast_and_gather(self.head)[...], taps_PBTD=taps_PBTD)
    return Output(
      x_BTD * c.d_model**-0.5, compute.cast_and_gather(self.embed)[...], taps_PBTD=taps_PBTD
    )


def relative_buckets(T: int, both_ways: bool, buckets: int, max_distance: int) -> np.ndarray:
  """Returns the bucket of each relative position, int32 [T, T] by (query, key).

  Near distances have one bucket each; far distances share buckets on a logarithmic scale.
  """
  distance = np.arange(T)[:, None] - np.arange(T)[None, :]  # from the key to the query
  first = np.zeros_like(distance)
  if both_ways:
    buckets //= 2
    first, distance = np.where(distance < 0, buckets, 0), np.abs(distance)
  distance = np.maximum(distance, 0)
  exact = buckets // 2
  # Computed in float32, so that the rounding is that of other implementations.
  far = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
  far = far / np.float32(np.log(max_distance / exact)) * np.float32(buckets - exact)
  far = np.minimum(exact + far.astype(np.int32), buckets - 1)
  return (first + np.where(distance < exact, distance, far)).astype(np.int32)


TINY = Config(
  vocab_size=256, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=3, num_heads=4
)

CONFIGS = {
  "tiny": TINY,
  "t5-v1.1-small": Config(32_128, 512, 64, 1_024, 8, 8, 6),
  "t5-v1.1-base": Config(32_128, 768, 64, 2_048, 12, 12, 12),
}
