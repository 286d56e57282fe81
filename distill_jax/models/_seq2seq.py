"""What encoder-decoders share: a decoder that reads a source, whole or a token at a time.

A layer attends to the target so far, then to the encoder's output, then feeds forward. A family
says how each of the three reads and joins the residual; what they have in common is here.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx, struct

from distill_jax.errors import InputError
from distill_jax.models import _encoder, _rope
from distill_jax.nn import attention, layers, sharding
from distill_jax.nn.params import unstack
from distill_jax.types import Output, SourceTarget

EPS = 1e-5  # of norms
ENCODER_AXIS = "encoder_layers"  # of stacked encoder layers: keep_layers means the decoder's


class Cache(struct.PyTreeNode):
  """What decoding keeps of B sources and of R = B * beams targets, T tokens each at most."""

  k_LRTHh: jax.Array
  v_LRTHh: jax.Array
  source_k_LBSHh: jax.Array
  source_v_LBSHh: jax.Array
  valid_BS: jax.Array | None


class DecoderLayer(nnx.Module):
  """One decoder layer. A family defines the parts that are annotated here.

  `qkv` and `attention_residual` are of the target so far, `source_q`, `source_kv` and
  `source_attention_residual` of the encoder's output; `feed_forward_block` comes last. What
  they take and return besides heads is the residual stream [B, T, D].
  """

  SCALE: ClassVar[float | None] = None  # of scores; 1/sqrt(h)

  qkv: Any
  attention_residual: Any
  source_q: Any
  source_kv: Any
  source_attention_residual: Any
  feed_forward_block: Any

  def __call__(self, x_BTD, memory_BSD, valid_BS, bias_1HTT=None) -> jax.Array:
    with jax.named_scope("attention"):
      q_BTHh, k_BTHh, v_BTHh = self.qkv(x_BTD)
      a_BTHh = attention.full(q_BTHh, k_BTHh, v_BTHh, None, True, self.SCALE, bias_1HTT)
      x_BTD = self.attention_residual(x_BTD, a_BTHh)
    with jax.named_scope("source"):
      q_BTHh, (k_BSHh, v_BSHh) = self.source_q(x_BTD), self.source_kv(memory_BSD)
      a_BTHh = attention.full(q_BTHh, k_BSHh, v_BSHh, valid_BS, scale=self.SCALE)
      x_BTD = self.source_attention_residual(x_BTD, a_BTHh)
    with jax.named_scope("mlp"):
      return self.feed_forward_block(x_BTD)

  def decode_step(self, x_R1D, kept: Cache, position, bias_1H1T=None) -> tuple[jax.Array, Any]:
    """The layer of one more token a row, all at one position: (its output, keys and values).

    Args: kept, without its axis of layers. The rows are the beams of each source in turn.
    """
    q_R1Hh, k_R1Hh, v_R1Hh = self.qkv(x_R1D)
    put = lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), position, 1)
    k_RTHh, v_RTHh = put(kept.k_LRTHh, k_R1Hh), put(kept.v_LRTHh, v_R1Hh)
    R, T = k_RTHh.shape[:2]
    past_RT = jnp.broadcast_to(jnp.arange(T)[None] <= position, (R, T))
    a_R1Hh = attention.full(q_R1Hh, k_RTHh, v_RTHh, past_RT, False, self.SCALE, bias_1H1T)
    x_R1D = self.attention_residual(x_R1D, a_R1Hh)
    q_R1Hh, k_BSHh, v_BSHh = self.source_q(x_R1D), kept.source_k_LBSHh, kept.source_v_LBSHh
    # A source's beams ask as its positions do: its keys are there once for all of them.
    q_BKHh = q_R1Hh.reshape(len(k_BSHh), -1, *q_R1Hh.shape[2:])
    a_BKHh = attention.full(q_BKHh, k_BSHh, v_BSHh, kept.valid_BS, scale=self.SCALE)
    x_R1D = self.source_attention_residual(x_R1D, a_BKHh.reshape(q_R1Hh.shape))
    return self.feed_forward_block(x_R1D), (k_RTHh, v_RTHh)


class Model(nnx.Module):
  """Source and target so far in, the next tokens' hidden states and the head out.

  A family has `layers`, its stack of DecoderLayers; `encode`, `embed_tokens`, `output`, and
  `target_bias` where its scores have one.
  """

  layers: Any
  encode: Any  # (source, how) -> the encoder's output [B, S, D], and what of it is no padding
  embed_tokens: Any  # (tokens, positions, how) -> what the first layer reads [B, T, D]
  output: Any  # (the last layer's output, how, taps) -> Output

  def target_bias(self, T: int, compute: layers.ComputeConfig) -> jax.Array | None:
    """Of scores between positions of the target, [1, H, T, T]; None: there is none."""
    del T, compute
    return None

  def __call__(
    self, inputs: SourceTarget, compute: layers.ComputeConfig, taps: tuple[int, ...] = ()
  ) -> Output:
    """Args: taps, decoder layers whose output is kept. Returns: Output, a position a target token.

    Padding ends a target, and no position sees what comes after it.
    """
    memory_BSD, valid_BS = self.encode(inputs.source, compute)
    target = inputs.target
    x_BTD = self.embed_tokens(target.tokens_BT, target.positions_BT, compute)
    x_BTD = sharding.constrain(x_BTD, "batch seq embed", compute.rules)
    bias = self.target_bias(x_BTD.shape[1], compute)
    run = lambda layer, i, x: layer(x, memory_BSD, valid_BS, bias)
    x_BTD, taps_PBTD = layers.scan_layers([self.layers], run, x_BTD, taps, compute)
    return self.output(x_BTD, compute, taps_PBTD)

  def init_cache(self, source: Any, beams: int, size: int, compute: layers.ComputeConfig) -> Cache:
    """An empty cache of targets of up to `size` tokens, and the source's keys and values."""
    memory_BSD, valid_BS = self.encode(source, compute)

    def one(_, layer):
      k_BSHh, v_BSHh = compute.cast_and_gather(unstack(layer)).source_kv(memory_BSD)
      empty = jnp.zeros((len(k_BSHh) * beams, size, *k_BSHh.shape[2:]), k_BSHh.dtype)
      return None, (empty, empty, k_BSHh, v_BSHh)

    k, v, source_k, source_v = jax.lax.scan(one, None, self.layers)[1]
    return Cache(k, v, source_k, source_v, valid_BS)

  def decode_step(
    self, tokens_R: jax.Array, position: jax.Array, cache: Cache, compute: layers.ComputeConfig
  ) -> tuple[Output, Cache]:
    """One more token of each target, all at one position: (Output of T = 1, the cache with it)."""
    places_R1 = jnp.full((len(tokens_R), 1), position, jnp.int32)
    x_R1D = self.embed_tokens(tokens_R[:, None], places_R1, compute)
    if (bias := self.target_bias(cache.k_LRTHh.shape[2], compute)) is not None:
      bias = jax.lax.dynamic_slice_in_dim(bias, position, 1, 2)

    def one(x_R1D, xs):
      layer, k, v, source_k, source_v = xs
      kept = Cache(k, v, source_k, source_v, cache.valid_BS)
      return compute.cast_and_gather(unstack(layer)).decode_step(x_R1D, kept, position, bias)

    stacked = cache.k_LRTHh, cache.v_LRTHh, cache.source_k_LBSHh, cache.source_v_LBSHh
    x_R1D, (k, v) = jax.lax.scan(one, x_R1D, (self.layers, *stacked))
    return self.output(x_R1D, compute, None), cache.replace(k_LRTHh=k, v_LRTHh=v)

  def qkv(self, layer: int, x_BTD: jax.Array, inputs: SourceTarget, compute: layers.ComputeConfig):
    """Queries, keys and values of a decoder layer, from the output of the layer before it."""
    del inputs
    here = jax.tree.map(lambda w: w[layer], self.layers)
    return compute.cast_and_gather(unstack(here)).qkv(x_BTD)


ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}


@dataclasses.dataclass(frozen=True)
class BartConfig:
  """The shape that Marian and Whisper share, in Hugging Face's words. There is no dropout."""

  vocab_size: int
  d_model: int
  encoder_layers: int
  encoder_attention_heads: int
  encoder_ffn_dim: int
  decoder_layers: int
  decoder_attention_heads: int
  decoder_ffn_dim: int

  OPTIONAL_ZERO: ClassVar[tuple[str, ...]] = (
    "pad_token_id",
    "eos_token_id",
    "decoder_start_token_id",
  )

  def __post_init__(self):
    _rope.check_numbers(self, self.OPTIONAL_ZERO)
    if self.d_model % 2:
      raise InputError(f"d_model is {self.d_model}; positions are pairs of sine and cosine")
    self.side("encoder"), self.side("decoder")  # they check heads and activation

  @property
  def activation(self) -> str:
    """Of both sides' feed-forwards, one of _encoder.ACTIVATIONS."""
    return "gelu"

  def side(self, name: str) -> _encoder.Config:
    """The shape of the layers of the "encoder" or the "decoder"."""
    of = lambda what: getattr(self, f"{name}_{what}")
    return _encoder.Config(
      self.d_model,
      of("ffn_dim"),
      of("layers"),
      of("attention_heads"),
      self.activation,
      layer_norm_eps=EPS,
    )

  def keep_layers(self, kept: tuple[int, ...]) -> Self:
    """The config of a model that has these decoder layers of this one, and all of the encoder."""
    return dataclasses.replace(self, decoder_layers=len(kept))

  @property
  def head_rows(self) -> int:
    return self.vocab_size

  @property
  def hidden_size(self) -> int:
    return self.d_model

  @property
  def num_hidden_layers(self) -> int:
    return self.decoder_layers

  @property
  def num_attention_heads(self) -> int:
    return self.decoder_attention_heads

  @property
  def num_key_value_heads(self) -> int:
    return self.decoder_attention_heads

  @property
  def head_dim(self) -> int:
    return self.d_model // self.decoder_attention_heads


class BartEncoderLayer(_encoder.Block):
  """An encoder layer as BART, and those after it, name its parts."""

  NAMES = {
    **{n: f"self_attn.{name}" for n, name in ATTENTION.items()},
    "attn_norm": "self_attn_layer_norm",
    "up": "fc1",
    "down": "fc2",
    "mlp_norm": "final_layer_norm",
  }


class BartDecoderLayer(DecoderLayer, BartEncoderLayer):  # type: ignore[misc]  # other arguments
  """The same with attention to the source between the two."""

  def __init__(self, c: Any, at: str, key: jax.Array):
    BartEncoderLayer.__init__(self, c, at, key)
    declare = _encoder.Declare(jax.random.fold_in(key, 1), at + "encoder_attn.")
    D, H, h = c.hidden_size, c.num_attention_heads, c.head_dim
    heads = f"embed:{D} heads:{H} head_dim:{h}"
    named = lambda n: declare.linear(ATTENTION[n], heads, "heads head_dim")
    self.source_wq, self.source_wk, self.source_wv = (named(n) for n in "qkv")
    self.source_o = declare.linear(ATTENTION["o"], f"heads:{H} head_dim:{h} embed:{D}", "embed")
    self.source_q_bias, self.source_v_bias, self.source_o_bias = (
      declare.bias(ATTENTION[n], D) for n in "qvo"
    )
    if self.KEY_BIAS:
      self.source_k_bias = declare.bias(ATTENTION["k"], D)
    norm = _encoder.Declare(jax.random.fold_in(key, 2), at).norm("encoder_attn_layer_norm", D)
    self.source_norm, self.source_norm_bias = norm

  def _norm(self, x_BTD: jax.Array, name: str) -> jax.Array:
    scale, bias = getattr(self, name)[...], getattr(self, f"{name}_bias")[...]
    return layers.layer_norm(x_BTD, scale, bias, self.config.layer_norm_eps)

  def _residual(self, x_BTD, a_BTHh, o, bias, norm: str) -> jax.Array:
    x_BTD = x_BTD + jnp.einsum("BTHh,HhD->BTD", a_BTHh, o[...]) + bias[...][None, None]
    return x_BTD if self.PRE_NORM else self._norm(x_BTD, norm)

  def attention_residual(self, x_BTD: jax.Array, a_BTHh: jax.Array) -> jax.Array:
    return self._residual(x_BTD, a_BTHh, self.o, self.o_bias, "attn_norm")

  def source_attention_residual(self, x_BTD: jax.Array, a_BTHh: jax.Array) -> jax.Array:
    return self._residual(x_BTD, a_BTHh, self.source_o, self.source_o_bias, "source_norm")

  def _heads(self, x_BSD: jax.Array, w: Any, bias: Any) -> jax.Array:
    y_BSHh = jnp.einsum("BSD,DHh->BSHh", x_BSD, w[...])
    return y_BSHh if bias is None else y_BSHh + bias[...].reshape(1, 1, *y_BSHh.shape[2:])

  def source_q(self, x_BTD: jax.Array) -> jax.Array:
    y_BTD = self._norm(x_BTD, "source_norm") if self.PRE_NORM else x_BTD
    return self._heads(y_BTD, self.source_wq, self.source_q_bias)

  def source_kv(self, memory_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
    k_bias = self.source_k_bias if self.KEY_BIAS else None
    return (
      self._heads(memory_BSD, self.source_wk, k_bias),
      self._heads(memory_BSD, self.source_wv, self.source_v_bias),
    )

  def feed_forward_block(self, x_BTD: jax.Array) -> jax.Array:
    y_BTD = self._norm(x_BTD, "mlp_norm") if self.PRE_NORM else x_BTD
    x_BTD = x_BTD + self.feed_forward(y_BTD)
    return x_BTD if self.PRE_NORM else self._norm(x_BTD, "mlp_norm")
