"""Whisper (arXiv:2212.04356) and Distil-Whisper: speech to text."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distill_jax.errors import bad_value
from distill_jax.models import _bart
from distill_jax.models._declare import Declare
from distill_jax.nn import layers, sharding
from distill_jax.nn.params import param
from distill_jax.types import JsonObject, Output, Sounds

HF_MODEL_TYPES = ("whisper",)  # model_type in config.json


@dataclasses.dataclass(frozen=True)
class Config(_bart.Config):
  """A model's architecture, under Hugging Face's field names. Dropout is 0."""

  num_mel_bins: int = 80
  max_source_positions: int = 1_500  # two frames each; all sounds have this length
  max_target_positions: int = 448
  pad_token_id: int = 50_256
  eos_token_id: int = 50_256
  decoder_start_token_id: int = 50_257

  MODEL_TYPE = "whisper"
  ARCHITECTURE = "WhisperForConditionalGeneration"
  SUPPORTED_VALUES = {
    "activation_function": "gelu",
    "scale_embedding": False,
    "is_encoder_decoder": True,
  }

  def to_hf(self) -> JsonObject:
    return {
      **super().to_hf(),
      "tie_word_embeddings": True,
      "use_cache": True,
      "bos_token_id": self.eos_token_id,
      "begin_suppress_tokens": None,
    }

  def ignores_tensor(self, name: str) -> bool:
    """Returns whether a checkpoint may hold this tensor although the model does not use it."""
    return name == "proj_out.weight"  # a copy of the decoder's embedding table


class EncoderLayer(_bart.EncoderLayer):
  KEY_BIAS = False


class DecoderLayer(_bart.DecoderLayer):
  KEY_BIAS = False


class Model(_bart.Model):
  """An encoder-decoder: log-mel frames and target tokens to hidden states of the target."""

  ENCODER_LAYER, DECODER_LAYER = EncoderLayer, DecoderLayer

  def __init__(self, c: Config, key: jax.Array):
    keys, D, M = jax.random.split(key, 8), c.d_model, c.num_mel_bins
    self.config = c
    at = "model.encoder."
    self.conv1, self.conv1_bias = _declare_conv(keys[0], f"{at}conv1", D, M)
    self.conv2, self.conv2_bias = _declare_conv(keys[1], f"{at}conv2", D, D)
    # The axis "bias" excludes these constants from weight decay.
    dims = f"bias:{c.max_source_positions} table:{D}"
    frames = param(keys[2], dims, f"{at}embed_positions.weight", init="zeros")
    self.frames = frames.replace(jnp.asarray(sinusoids(c.max_source_positions, D)))
    self.encoder_norm, self.encoder_norm_bias = Declare(keys[4], at).layer_norm("layer_norm", D)
    at = "model.decoder."
    dims = f"vocab:{c.vocab_size} table:{D}"
    self.embed = param(keys[5], dims, f"{at}embed_tokens.weight", "vocab", init=0.02)
    dims = f"places:{c.max_target_positions} table:{D}"
    self.places = param(keys[6], dims, f"{at}embed_positions.weight", init=0.02)
    self.norm, self.norm_bias = Declare(keys[4], at).layer_norm("layer_norm", D)
    self.declare_layers(c, keys[3], keys[7])

  def encode(self, source: Sounds, compute: layers.ComputeConfig) -> tuple[jax.Array, None]:
    """Returns the encoder's output [B, S, D], and None: padding, i.e. silence, is not masked."""
    want = 2 * self.config.max_source_positions
    if source.mel_BSM.shape[1] != want:
      frames = source.mel_BSM.shape[1]
      raise bad_value("frames of a sound", frames, f"{want} for this model", "Pad or cut the sound")
    with jax.named_scope("embed"):
      x_BSD = source.mel_BSM.astype(compute.dtype)
      weight, bias = (compute.cast_and_gather(v)[...] for v in (self.conv1, self.conv1_bias))
      x_BSD = conv(x_BSD, weight, bias, stride=1)
      weight, bias = (compute.cast_and_gather(v)[...] for v in (self.conv2, self.conv2_bias))
      x_BSD = conv(x_BSD, weight, bias, stride=2)
      x_BSD += jax.lax.stop_gradient(compute.cast_and_gather(self.frames)[...])[None]
      x_BSD = sharding.constrain(x_BSD, "batch seq embed", compute.rules)
    x_BSD, _ = layers.scan_layers(
      [self.encoder], lambda layer, i, x: layer(x, None), x_BSD, (), compute
    )
    norm, norm_bias = self.encoder_norm[...], self.encoder_norm_bias[...]
    return layers.layer_norm(x_BSD, norm, norm_bias, _bart.EPS), None

  def embed_tokens(
    self, tokens_BT: jax.Array, positions_BT: jax.Array, compute: layers.ComputeConfig
  ):
    with jax.named_scope("embed"):
      x_BTD = compute.lookup(self.embed, tokens_BT)
      return x_BTD + compute.lookup(self.places, positions_BT)

  def output(self, x_BTD: jax.Array, compute: layers.ComputeConfig, taps_PBTD) -> Output:
    x_BTD = layers.layer_norm(x_BTD, self.norm[...], self.norm_bias[...], _bart.EPS)
    return Output(x_BTD, compute.cast_and_gather(self.embed)[...], taps_PBTD=taps_PBTD)


def _declare_conv(
  key: jax.Array, module: str, filters: int, channels: int
) -> tuple[nnx.Param, nnx.Param]:
  """Declares a convolution over three frames; returns (weight, bias)."""
  # In torch's layout of a convolution: [out, in, kernel].
  dims = f"filters:{filters} channels:{channels} kernel:3"
  weight = param(key, dims, f"{module}.weight", init=(3 * channels) ** -0.5)
  return weight, Declare(key, "").bias(module, filters)


def conv(x_BSM: jax.Array, w_DMk: jax.Array, bias_D: jax.Array, stride: int) -> jax.Array:
  """Returns the gelu of a convolution over time, padded by one frame on each side."""
  y_BSD = jax.lax.conv_general_dilated(
    x_BSM, w_DMk, (stride,), [(1, 1)], dimension_numbers=("NWC", "OIW", "NWC")
  )
  return jax.nn.gelu(y_BSD + bias_D[None, None], approximate=False)


def sinusoids(length: int, width: int) -> np.ndarray:
  """Returns float32 [length, width]: sines, then cosines, with periods from 2 pi to 20,000 pi."""
  rate = np.exp(-np.log(10_000) / (width // 2 - 1) * np.arange(width // 2))
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
  num_mel_bins=8,
  max_source_positions=16,
  max_target_positions=64,
  pad_token_id=0,
  eos_token_id=1,
  decoder_start_token_id=2,
)

CONFIGS = {
  "tiny": TINY,
  "whisper-tiny.en": Config(51_864, 384, 4, 6, 1_536, 4, 6, 1_536),
  "whisper-base.en": Config(51_864, 512, 6, 8, 2_048, 6, 8, 2_048),
  "whisper-small.en": Config(51_864, 768, 12, 12, 3_072, 12, 12, 3_072),
}
