"""What encoder-decoders share: a decoder that reads a source, whole or a token at a time.

A family (t5.py; marian.py and whisper.py through _bart.py) defines the parts of a layer and of the
model; how they are put together, and how tokens are decoded one by one, is here.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx, struct

from distill_jax.models._family import FamilyDefaults
from distill_jax.nn import attention, sharding
from distill_jax.nn.layers import ComputeConfig, scan_layers
from distill_jax.nn.params import take_layer, unstack
from distill_jax.types import QKV, Output, SourceTarget

ENCODER_AXIS = "encoder_layers"  # of stacked encoder layers: keep_layers means the decoder's


@dataclasses.dataclass(frozen=True)
class DecoderSizes(FamilyDefaults):
  """Sizes that are asked of every config: those of the decoder. A family adds its heads.

  Attributes:
    DECODER_LAYERS: the family's field with the number of decoder layers.
    OPTIONAL_ZERO: fields that may be 0.
  """

  vocab_size: int
  d_model: int

  DECODER_LAYERS: ClassVar[str]
  OPTIONAL_ZERO: ClassVar[tuple[str, ...]] = (
    "pad_token_id",
    "eos_token_id",
    "decoder_start_token_id",
  )

  def keep_layers(self, kept: tuple[int, ...]) -> Self:
    """The config of a model that has these decoder layers of this one, and all of the encoder."""
    return dataclasses.replace(self, **{self.DECODER_LAYERS: len(kept)})

  @property
  def num_hidden_layers(self) -> int:
    layers: int = getattr(self, self.DECODER_LAYERS)
    return layers

  @property
  def num_attention_heads(self) -> int:
    raise NotImplementedError

  @property
  def head_dim(self) -> int:
    raise NotImplementedError

  @property
  def value_head_dim(self) -> int:
    return self.head_dim

  @property
  def head_rows(self) -> int:
    return self.vocab_size

  @property
  def hidden_size(self) -> int:
    return self.d_model

  @property
  def num_key_value_heads(self) -> int:
    return self.num_attention_heads


class Cache(struct.PyTreeNode):
  """What decoding keeps of B sources and of B * J targets, J beams each, of up to Z tokens.

  Targets are the axis X: the beams of the first source, then those of the next.
  """

  k_LXZHh: jax.Array
  v_LXZHh: jax.Array
  source_k_LBSHh: jax.Array
  source_v_LBSHh: jax.Array
  valid_BS: jax.Array | None


class LayerCache(NamedTuple):
  """One layer's part of a Cache."""

  k_XZHh: jax.Array
  v_XZHh: jax.Array
  source_k_BSHh: jax.Array
  source_v_BSHh: jax.Array


class DecoderLayer(nnx.Module):
  """One decoder layer, of what a family defines in the methods that raise here.

  A layer attends to the target so far, then to the source, then feeds forward; x_BTD is the
  residual stream.
  """

  SCALE: ClassVar[float | None] = None  # of scores; 1/sqrt(h)

  def qkv(self, x_BTD: jax.Array) -> QKV:
    """Queries, keys and values of the target [B, T, H, h]."""
    raise NotImplementedError

  def attention_residual(self, x_BTD: jax.Array, a_BTHh: jax.Array) -> jax.Array:
    """The residual with what attention to the target gives."""
    raise NotImplementedError

  def source_q(self, x_BTD: jax.Array) -> jax.Array:
    """Queries to the source [B, T, H, h]."""
    raise NotImplementedError

  def source_kv(self, memory_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values [B, S, H, h] of the encoder's output."""
    raise NotImplementedError

  def source_attention_residual(self, x_BTD: jax.Array, a_BTHh: jax.Array) -> jax.Array:
    """The residual with what attention to the source gives."""
    raise NotImplementedError

  def feed_forward_block(self, x_BTD: jax.Array) -> jax.Array:
    """The residual with what the feed-forward gives."""
    raise NotImplementedError

  def __call__(
    self,
    x_BTD: jax.Array,
    memory_BSD: jax.Array,
    valid_BS: jax.Array | None,
    bias_1HTT: jax.Array | None = None,
  ) -> jax.Array:
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

  def decode_step(
    self,
    x_X1D: jax.Array,
    cache: LayerCache,
    valid_BS: jax.Array | None,
    position: jax.Array,
    bias_1H1Z: jax.Array | None = None,
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The layer of one more token of each target, all at one position.

    Returns: (the residual, the target's keys and values with the new ones).
    """
    q_X1Hh, k_X1Hh, v_X1Hh = self.qkv(x_X1D)
    k_XZHh = _write_position(cache.k_XZHh, k_X1Hh, position)
    v_XZHh = _write_position(cache.v_XZHh, v_X1Hh, position)
    X, Z = k_XZHh.shape[:2]
    past_XZ = jnp.broadcast_to(jnp.arange(Z)[None] <= position, (X, Z))
    a_X1Hh = attention.full(q_X1Hh, k_XZHh, v_XZHh, past_XZ, False, self.SCALE, bias_1H1Z)
    x_X1D = self.attention_residual(x_X1D, a_X1Hh)
    q_X1Hh, k_BSHh, v_BSHh = self.source_q(x_X1D), cache.source_k_BSHh, cache.source_v_BSHh
    # A source's beams attend as its positions do: its keys are there once for all of them.
    q_BJHh = q_X1Hh.reshape(len(k_BSHh), -1, *q_X1Hh.shape[2:])
    a_BJHh = attention.full(q_BJHh, k_BSHh, v_BSHh, valid_BS, scale=self.SCALE)
    x_X1D = self.source_attention_residual(x_X1D, a_BJHh.reshape(q_X1Hh.shape))
    return self.feed_forward_block(x_X1D), (k_XZHh, v_XZHh)


def _write_position(old_XZHh: jax.Array, new_X1Hh: jax.Array, position: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(old_XZHh, new_X1Hh.astype(old_XZHh.dtype), position, 1)


class Model(nnx.Module):
  """Source and target so far in, the next tokens' hidden states and the head out.

  A family has `layers`, its stack of DecoderLayers, and defines the methods that raise here.
  """

  layers: DecoderLayer

  def encode(self, source: Any, compute: ComputeConfig) -> tuple[jax.Array, jax.Array | None]:
    """(the encoder's output [B, S, D], which of its positions are no padding; None: all).

    Args: source, Inputs or Sounds: each family narrows its type.
    """
    raise NotImplementedError

  def embed_tokens(
    self, tokens_BT: jax.Array, positions_BT: jax.Array, compute: ComputeConfig
  ) -> jax.Array:
    """The first decoder layer's input [B, T, D]."""
    raise NotImplementedError

  def output(self, x_BTD: jax.Array, compute: ComputeConfig, taps_PBTD: jax.Array | None) -> Output:
    """The model's output, from that of its last layer."""
    raise NotImplementedError

  def target_bias(self, T: int, compute: ComputeConfig) -> jax.Array | None:
    """The bias of scores between target positions, [1, H, T, T], or None."""
    del T, compute
    return None

  def __call__(
    self, inputs: SourceTarget, compute: ComputeConfig, taps: tuple[int, ...] = ()
  ) -> Output:
    """Args: taps, decoder layers whose output is kept. Returns: Output, a position a target token.

    Padding ends a target, and no position sees what comes after it.
    """
    memory_BSD, valid_BS = self.encode(inputs.source, compute)
    target = inputs.target
    x_BTD = self.embed_tokens(target.tokens_BT, target.positions_BT, compute)
    x_BTD = sharding.constrain(x_BTD, "batch seq embed", compute.rules)
    bias_1HTT = self.target_bias(x_BTD.shape[1], compute)

    def apply(layer: DecoderLayer, i: jax.Array, x_BTD: jax.Array) -> jax.Array:
      return layer(x_BTD, memory_BSD, valid_BS, bias_1HTT)

    x_BTD, taps_PBTD = scan_layers([self.layers], apply, x_BTD, taps, compute)
    return self.output(x_BTD, compute, taps_PBTD)

  def init_cache(self, source: Any, beams: int, size: int, compute: ComputeConfig) -> Cache:
    """An empty cache of targets of up to `size` tokens, and the source's keys and values."""
    memory_BSD, valid_BS = self.encode(source, compute)

    def init_layer(_, layer):
      k_BSHh, v_BSHh = compute.cast_and_gather(unstack(layer)).source_kv(memory_BSD)
      empty_XZHh = jnp.zeros((len(k_BSHh) * beams, size, *k_BSHh.shape[2:]), k_BSHh.dtype)
      return None, LayerCache(empty_XZHh, empty_XZHh, k_BSHh, v_BSHh)

    _, (k_LXZHh, v_LXZHh, source_k_LBSHh, source_v_LBSHh) = jax.lax.scan(
      init_layer, None, self.layers
    )
    return Cache(k_LXZHh, v_LXZHh, source_k_LBSHh, source_v_LBSHh, valid_BS)

  def decode_step(
    self, tokens_X: jax.Array, position: jax.Array, cache: Cache, compute: ComputeConfig
  ) -> tuple[Output, Cache]:
    """One more token of each target, all at one position: (Output of T = 1, the cache with it)."""
    positions_X1 = jnp.full((len(tokens_X), 1), position, jnp.int32)
    x_X1D = self.embed_tokens(tokens_X[:, None], positions_X1, compute)
    if (bias := self.target_bias(cache.k_LXZHh.shape[2], compute)) is not None:
      bias = jax.lax.dynamic_slice_in_dim(bias, position, 1, 2)

    def step_layer(x_X1D, xs):
      layer, layer_cache = xs
      layer = compute.cast_and_gather(unstack(layer))
      return layer.decode_step(x_X1D, layer_cache, cache.valid_BS, position, bias)

    stacked = LayerCache(cache.k_LXZHh, cache.v_LXZHh, cache.source_k_LBSHh, cache.source_v_LBSHh)
    x_X1D, (k_LXZHh, v_LXZHh) = jax.lax.scan(step_layer, x_X1D, (self.layers, stacked))
    return self.output(x_X1D, compute, None), cache.replace(k_LXZHh=k_LXZHh, v_LXZHh=v_LXZHh)

  def qkv(self, layer: int, x_BTD: jax.Array, inputs: SourceTarget, compute: ComputeConfig) -> QKV:
    """Queries, keys and values of a decoder layer, from the output of the layer before it."""
    del inputs
    return compute.cast_and_gather(take_layer(self.layers, layer)).qkv(x_BTD)
