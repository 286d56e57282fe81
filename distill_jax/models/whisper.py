"""Whisper and Distil-Whisper, which has fewer decoder layers (arXiv:2212.04356): speech to text."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.errors import InputError
from distill_jax.models import _encoder, _seq2seq
from distill_jax.nn import layers, sharding
from distill_jax.nn.params import param, stack
from distill_jax.types import Output, Sounds

HF_MODEL_TYPES = ("whisper",)  # of config.json
SUPPORTED_VALUES = {
  "activation_function": "gelu",
  "scale_embedding": False,
  "is_encoder_decoder": True,
}


@dataclasses.dataclass(frozen=True)
class Config(_seq2seq.BartConfig):
  """The shape of a model, in Hugging Face's words. There is no dropout."""

  num_mel_bins: int = 80
  max_source_positions: int = 1_500  # two frames each; every sound has just so many
  max_target_positions: int = 448
  pad_token_id: int = 50_256
  eos_token_id: int = 50_256
  decoder_start_token_id: int = 50_257

  @classmethod
  def from_hf(cls, hf: dict[str, Any]) -> Self:
    """From a Hugging Face config.json; what this family cannot do is refused by name."""
    for key, want in SUPPORTED_VALUES.items():
      if hf.get(key, want) != want:
        raise InputError(f"config.json has {key}={hf[key]!r}; the whisper family has {want!r} only")
    names = {f.name for f in dataclasses.fields(cls)}
    return cls(**{name: hf[name] for name in names if hf.get(name) is not None})

  def to_hf(self) -> dict[str, Any]:
    """The config.json of this model."""
    return {
      "architectures": ["WhisperForConditionalGeneration"],
      "model_type": "whisper",
      **SUPPORTED_VALUES,
      **dataclasses.asdict(self),
      "dropout": 0.0,
      "attention_dropout": 0.0,
      "activation_dropout": 0.0,
      "tie_word_embeddings": True,
      "use_cache": True,
      "bos_token_id": self.eos_token_id,
      "begin_suppress_tokens": None,
    }

  def ignores_tensor(self, name: str) -> bool:
    """Whether a checkpoint may hold this tensor although the model has no use for it."""
    return name == "proj_out.weight"  # the table of the decoder's tokens once more


class EncoderLayer(_seq2seq.BartEncoderLayer):
  KEY_BIAS = False


class DecoderLayer(_seq2seq.BartDecoderLayer):
  KEY_BIAS = False


class Model(_seq2seq.Model):
  """Log-mel frames in, the next tokens of what is said in them out."""

  def __init__(self, c: Config, key: jax.Array):
    keys, D, M = jax.random.split(key, 8), c.d_model, c.num_mel_bins
    self.config = c
    at = "model.encoder."
    # As torch lays it out, [out, in, kernel], each a matrix to nobody but the convolution.
    conv = lambda k, name, m: (
      param(k, f"filters:{D} channels:{m} kernel:3", f"{at}{name}.weight", init=(3 * m) ** -0.5),
      _encoder.Declare(k, at).bias(name, D),
    )
    self.conv1, self.conv1_bias = conv(keys[0], "conv1", M)
    self.conv2, self.conv2_bias = conv(keys[1], "conv2", D)
    # "bias" keeps optim.py from decaying what is never trained.
    self.frames = param(
      keys[2],
      f"bias:{c.max_source_positions} table:{D}",
      f"{at}embed_positions.weight",
      init="zeros",
    )
    self.frames = self.frames.replace(jnp.asarray(sinusoids(c.max_source_positions, D)))
    block: Any = functools.partial(EncoderLayer, c.side("encoder"), at + "layers.{encoder_layers}.")
    self.encoder = stack(c.encoder_layers, block, keys[3], axis=_seq2seq.ENCODER_AXIS)
    self.encoder_norm, self.encoder_norm_bias = _encoder.Declare(keys[4], at).norm("layer_norm", D)
    at = "model.decoder."
    table = lambda k, dims, name, out="": param(
      k, f"{dims} table:{D}", f"{at}{name}.weight", out, init=0.02
    )
    self.embed = table(keys[5], f"vocab:{c.vocab_size}", "embed_tokens", "vocab")
    self.places = table(keys[6], f"places:{c.max_target_positions}", "embed_positions")
    block = functools.partial(DecoderLayer, c.side("decoder"), at + "layers.{layers}.")
    self.layers = stack(c.decoder_layers, block, keys[7])
    self.norm, self.norm_bias = _encoder.Declare(keys[4], at).norm("layer_norm", D)

  def encode(self, source: Sounds, compute: layers.ComputeConfig) -> tuple[jax.Array, None]:
    """The encoder's output [B, S, D]; all of it is seen, silence too."""
    want = 2 * self.config.max_source_positions
    if source.mel_BSM.shape[1] != want:
      raise InputError(f"a sound has {source.mel_BSM.shape[1]} frames and whisper reads {want}")
    with jax.named_scope("embed"):
      x_BSD = source.mel_BSM.astype(compute.dtype)
      x_BSD = conv(
        x_BSD,
        compute.cast_and_gather(self.conv1)[...],
        compute.cast_and_gather(self.conv1_bias)[...],
        stride=1,
      )
      x_BSD = conv(
        x_BSD,
        compute.cast_and_gather(self.conv2)[...],
        compute.cast_and_gather(self.conv2_bias)[...],
        stride=2,
      )
      x_BSD += jax.lax.stop_gradient(compute.cast_and_gather(self.frames)[...])[None]
      x_BSD = sharding.constrain(x_BSD, "batch seq embed", compute.rules)
    run = lambda layer, i, x: layer(x, None)
    x_BSD, _ = layers.scan_layers([self.encoder], run, x_BSD, (), compute)
    return layers.layer_norm(
      x_BSD, self.encoder_norm[...], self.encoder_norm_bias[...], _seq2seq.EPS
    ), None

  def embed_tokens(
    self, tokens_BT: jax.Array, positions_BT: jax.Array, compute: layers.ComputeConfig
  ):
    with jax.named_scope("embed"):
      x_BTD = compute.cast_and_gather(self.embed)[...][tokens_BT]
      return x_BTD + compute.cast_and_gather(self.places)[...][positions_BT]

  def output(self, x_BTD: jax.Array, compute: layers.ComputeConfig, taps_PBTD) -> Output:
    x_BTD = layers.layer_norm(x_BTD, self.norm[...], self.norm_bias[...], _seq2seq.EPS)
    return Output(x_BTD, compute.cast_and_gather(self.embed)[...], taps_PBTD=taps_PBTD)


def conv(x_BSM: jax.Array, w_DMK: jax.Array, bias_D: jax.Array, stride: int) -> jax.Array:
  """gelu of a convolution over time, padded by one frame on each side."""
  y_BSD = jax.lax.conv_general_dilated(
    x_BSM, w_DMK, (stride,), [(1, 1)], dimension_numbers=("NWC", "OIW", "NWC")
  )
  return jax.nn.gelu(y_BSD + bias_D[None, None], approximate=False)


def sinusoids(length: int, width: int) -> np.ndarray:
  """float32 [length, width]: sines, then cosines, of periods from 2 pi to 20,000 pi."""
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
