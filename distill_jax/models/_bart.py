"""Encoder-decoders with the architecture of BART (arXiv:1910.13461): Marian and Whisper."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar, Self

import jax
from flax import nnx

from distill_jax.errors import bad_value
from distill_jax.models import _encoder, _seq2seq
from distill_jax.models._declare import Declare
from distill_jax.models._family import check_numbers, check_supported
from distill_jax.nn import layers
from distill_jax.nn.params import ENCODER_LAYERS, stack
from distill_jax.nn.products import product
from distill_jax.types import QKV, JsonObject

EPS = 1e-5  # epsilon of norms
ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}


@dataclasses.dataclass(frozen=True)
class Config(_seq2seq.DecoderSizes):
  """The architecture that Marian and Whisper share, under Hugging Face's field names.

  Dropout is 0.
  """

  encoder_layers: int
  encoder_attention_heads: int
  encoder_ffn_dim: int
  decoder_layers: int
  decoder_attention_heads: int
  decoder_ffn_dim: int

  MODEL_TYPE: ClassVar[str]
  ARCHITECTURE: ClassVar[str]
  SUPPORTED_VALUES: ClassVar[JsonObject]
  DECODER_LAYERS: ClassVar[str] = "decoder_layers"

  def __post_init__(self):
    check_numbers(self, self.OPTIONAL_ZERO)
    if self.d_model % 2:
      raise bad_value("d_model", self.d_model, "an even number", "Correct the model's config")
    self.side("encoder"), self.side("decoder")  # these calls check heads and activation

  @classmethod
  def from_hf(cls, hf: JsonObject) -> Self:
    """Returns the config for a Hugging Face config.json; unsupported values raise InputError."""
    check_supported(hf, cls.SUPPORTED_VALUES, cls.MODEL_TYPE)
    names = {f.name for f in dataclasses.fields(cls)}
    return cls(**{name: hf[name] for name in names if hf.get(name) is not None})

  def to_hf(self) -> JsonObject:
    """Returns the config.json of the model."""
    return {
      "architectures": [self.ARCHITECTURE],
      "model_type": self.MODEL_TYPE,
      **self.SUPPORTED_VALUES,
      **dataclasses.asdict(self),
      "dropout": 0.0,
      "attention_dropout": 0.0,
      "activation_dropout": 0.0,
    }

  @property
  def activation(self) -> str:
    """The feed-forward activation of both sides, one of _encoder.ACTIVATIONS."""
    return "gelu"

  def side(self, name: str) -> _encoder.Config:
    """Returns the architecture of the layers of the "encoder" or the "decoder"."""
    return _encoder.Config(
      self.d_model,
      getattr(self, f"{name}_ffn_dim"),
      getattr(self, f"{name}_layers"),
      getattr(self, f"{name}_attention_heads"),
      self.activation,
      layer_norm_eps=EPS,
    )

  @property
  def num_attention_heads(self) -> int:
    return self.decoder_attention_heads

  @property
  def head_dim(self) -> int:
    return self.d_model // self.decoder_attention_heads


class EncoderLayer(_encoder.Block):
  """An encoder layer with BART's names of its parts."""

  NAMES = {
    **{n: f"self_attn.{name}" for n, name in ATTENTION.items()},
    "attn_norm": "self_attn_layer_norm",
    "up": "fc1",
    "down": "fc2",
    "mlp_norm": "final_layer_norm",
  }


class DecoderLayer(_seq2seq.DecoderLayer, EncoderLayer):  # type: ignore[misc]  # other arguments
  """An encoder layer with attention to the source added before the feed-forward."""

  def __init__(self, c: _encoder.Config, prefix: str, key: jax.Array):
    EncoderLayer.__init__(self, c, prefix, key)
    declare = Declare(jax.random.fold_in(key, 1), prefix + "encoder_attn.")
    D, H, h = c.hidden_size, c.num_attention_heads, c.head_dim
    heads = f"embed:{D} heads:{H} head_dim:{h}"
    self.source_wq, self.source_wk, self.source_wv = (
      declare.linear(ATTENTION[n], heads, "heads head_dim") for n in "qkv"
    )
    self.source_o = declare.linear(ATTENTION["o"], f"heads:{H} head_dim:{h} embed:{D}", "embed")
    self.source_q_bias, self.source_v_bias, self.source_o_bias = (
      declare.bias(ATTENTION[n], D) for n in "qvo"
    )
    if self.KEY_BIAS:
      self.source_k_bias = declare.bias(ATTENTION["k"], D)
    declare = Declare(jax.random.fold_in(key, 2), prefix)
    self.source_norm, self.source_norm_bias = declare.layer_norm("encoder_attn_layer_norm", D)

  def _norm(self, x_BTD: jax.Array, name: str) -> jax.Array:
    scale, bias = getattr(self, name)[...], getattr(self, f"{name}_bias")[...]
    return layers.layer_norm(x_BTD, scale, bias, self.config.layer_norm_eps)

  def _residual(
    self, x_BTD: jax.Array, a_BTHh: jax.Array, o: nnx.Param, bias: nnx.Param, norm: str
  ) -> jax.Array:
    """Adds an attention's projected output to the residual, and norms it unless PRE_NORM."""
    x_BTD = x_BTD + product(a_BTHh, o[...], 2) + bias[...][None, None]
    return x_BTD if self.PRE_NORM else self._norm(x_BTD, norm)

  def qkv(self, x_BTD: jax.Array) -> QKV:
    return EncoderLayer.qkv(self, x_BTD)

  def attention_residual(self, x_BTD: jax.Array, a_BTHh: jax.Array) -> jax.Array:
    return self._residual(x_BTD, a_BTHh, self.o, self.o_bias, "attn_norm")

  def source_attention_residual(self, x_BTD: jax.Array, a_BTHh: jax.Array) -> jax.Array:
    return self._residual(x_BTD, a_BTHh, self.source_o, self.source_o_bias, "source_norm")

  def source_q(self, x_BTD: jax.Array) -> jax.Array:
    y_BTD = self._norm(x_BTD, "source_norm") if self.PRE_NORM else x_BTD
    return _encoder.heads_of(y_BTD, self.source_wq, self.source_q_bias)

  def source_kv(self, memory_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
    k_bias = self.source_k_bias if self.KEY_BIAS else None
    return (
      _encoder.heads_of(memory_BSD, self.source_wk, k_bias),
      _encoder.heads_of(memory_BSD, self.source_wv, self.source_v_bias),
    )

  def feed_forward_block(self, x_BTD: jax.Array) -> jax.Array:
    y_BTD = self._norm(x_BTD, "mlp_norm") if self.PRE_NORM else x_BTD
    x_BTD = x_BTD + self.feed_forward(y_BTD)
    return x_BTD if self.PRE_NORM else self._norm(x_BTD, "mlp_norm")


class Model(_seq2seq.Model):
  """An encoder-decoder. This class declares its layers, and the family the other parameters."""

  ENCODER_LAYER: ClassVar[type[EncoderLayer]]
  DECODER_LAYER: ClassVar[type[DecoderLayer]]

  def declare_layers(self, c: Config, encoder_key: jax.Array, decoder_key: jax.Array) -> None:
    """Declares the stacks `encoder` and `layers`."""
    prefix = "model.encoder.layers.{encoder_layers}."
    encoder_layer = functools.partial(self.ENCODER_LAYER, c.side("encoder"), prefix)
    self.encoder = stack(c.encoder_layers, encoder_layer, encoder_key, axis=ENCODER_LAYERS)
    prefix = "model.decoder.layers.{layers}."
    decoder_layer = functools.partial(self.DECODER_LAYER, c.side("decoder"), prefix)
    self.layers = stack(c.decoder_layers, decoder_layer, decoder_key)
