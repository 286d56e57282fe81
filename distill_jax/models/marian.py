"""Marian (arXiv:1804.00344), the architecture of the Opus-MT translation models.

Both languages and the head share one embedding table; positions are sinusoids; logits have a bias.
"""

from __future__ import annotations

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.errors import bad_value
from distill_jax.models import _bart
from distill_jax.nn import layers, sharding
from distill_jax.nn.params import param
from distill_jax.types import Inputs, JsonObject, Output

HF_MODEL_TYPES = ("marian",)  # model_type in config.json


@dataclasses.dataclass(frozen=True)
class Config(_bart.Config):
  """A model's architecture, under Hugging Face's field names. Dropout is 0."""

  activation_function: str = "swish"
  scale_embedding: bool = True
  max_position_embeddings: int = 512
  pad_token_id: int = 58_100
  eos_token_id: int = 0
  decoder_start_token_id: int = 58_100

  MODEL_TYPE = "marian"
  ARCHITECTURE = "MarianMTModel"
  SUPPORTED_VALUES = {
    "is_encoder_decoder": True,
    "share_encoder_decoder_embeddings": True,
    "tie_word_embeddings": True,
  }

  @property
  def activation(self) -> str:
    return self.activation_function

  @classmethod
  def from_hf(cls, hf: JsonObject) -> Self:
    config = super().from_hf(hf)
    if hf.get("decoder_vocab_size") not in (None, hf["vocab_size"]):
      key, expected = "decoder_vocab_size", f"{hf['vocab_size']}, the same as vocab_size"
      raise bad_value(f"{key} in config.json", hf[key], expected, "Use another model")
    return config

  def to_hf(self) -> JsonObject:
    return {
      **super().to_hf(),
      "decoder_vocab_size": self.vocab_size,
      "use_cache": True,
      "forced_eos_token_id": None,
    }

  def ignores_tensor(self, name: str) -> bool:
    """Returns whether a checkpoint may hold this tensor although the model does not use it."""
    copies = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
    return name in (*copies, "lm_head.weight") or name.endswith("embed_positions.weight")


class EncoderLayer(_bart.EncoderLayer):
  PRE_NORM = False


class DecoderLayer(_bart.DecoderLayer):
  PRE_NORM = False


class Model(_bart.Model):
  """An encoder-decoder: source and target tokens to hidden states of the target."""

  ENCODER_LAYER, DECODER_LAYER = EncoderLayer, DecoderLayer

  def __init__(self, c: Config, key: jax.Array):
    keys, V, D = jax.random.split(key, 4), c.vocab_size, c.d_model
    self.config = c
    self.embed = param(keys[0], f"vocab:{V} table:{D}", "model.shared.weight", "vocab", D**-0.5)
    self.declare_layers(c, keys[1], keys[2])
    self.head_bias = param(keys[3], f"bias:1 vocab:{V}", "final_logits_bias", init="zeros")

  def encode(self, source: Inputs, compute: layers.ComputeConfig) -> tuple[jax.Array, jax.Array]:
    """Returns the encoder's output [B, S, D], and a mask of positions that are not padding."""
    valid_BS = source.segments_BT > 0
    x_BSD = self.embed_tokens(source.tokens_BT, source.positions_BT, compute)
    x_BSD = sharding.constrain(x_BSD, "batch seq embed", compute.rules)
    x_BSD, _ = layers.scan_layers(
      [self.encoder], lambda layer, i, x: layer(x, valid_BS), x_BSD, (), compute
    )
    return x_BSD, valid_BS

  def embed_tokens(
    self, tokens_BT: jax.Array, positions_BT: jax.Array, compute: layers.ComputeConfig
  ):
    c = self.config
    with jax.named_scope("embed"):
      x_BTD = compute.lookup(self.embed, tokens_BT)
      if c.scale_embedding:
        x_BTD = x_BTD * jnp.asarray(c.d_model**0.5, x_BTD.dtype)
      places = jnp.asarray(sinusoids(c.max_position_embeddings, c.d_model), x_BTD.dtype)
      return x_BTD + places[positions_BT]

  def output(self, x_BTD: jax.Array, compute: layers.ComputeConfig, taps_PBTD) -> Output:
    head_VD = compute.cast_and_gather(self.embed)[...]
    bias_V = compute.cast_and_gather(self.head_bias)[...][0]
    return Output(*layers.with_bias(x_BTD, head_VD, bias_V), taps_PBTD=taps_PBTD)


def sinusoids(length: int, width: int) -> np.ndarray:
  """Returns float32 [length, width]: sines in the first half, then cosines (arXiv:1706.03762)."""
  rate = 10_000.0 ** (-2 * np.arange(width // 2) / width)
  angle = np.arange(length)[:, None] * rate[None]
  return np.concatenate([np.sin(angle), np.cos(angle)], 1).astype(np.float32)


TINY = Config(
  vocab_size=256,
  d_model=32,
  encoder_layers=2,
  encoder_attention_heads=4,
  encoder_ffn_dim=64,
  decoder_layers=3,
  decoder_attention_heads=4,
  decoder_ffn_dim=64,
  max_position_embeddings=128,
  pad_token_id=0,
  eos_token_id=1,
  decoder_start_token_id=0,
)

CONFIGS = {"tiny": TINY, "opus-mt": Config(58_101, 512, 6, 8, 2_048, 6, 8, 2_048)}
