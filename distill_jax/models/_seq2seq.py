"""The base of encoder-decoders: the decoder layer and the model, for training and for decoding.

A family (t5.py; marian.py and whisper.py through _bart.py) defines the parts of a layer and of the
model. This module combines them, and decodes token by token.
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


@dataclasses.dataclass(frozen=True)
class DecoderSizes(FamilyDefaults):
  """The sizes in types.FamilyConfig, which are those of the decoder.

  Attributes:
    DECODER_LAYERS: the family's field for the number of decoder layers.
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
    """Returns the config of a model with only these decoder layers, and the whole encoder."""
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
  """The cache for decoding B sources with J beams each: B * J targets of up to Z tokens.

  The axis X enumerates targets: the beams of the first source, then those of the second, etc.
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
  """One decoder layer: attention to the target, attention to the source, feed-forward.

  A family overrides the methods that raise here. `x_BTD` is the residual stream.
  """

  SCALE: ClassVar[float | None] = None  # factor of attention scores; None for 1/sqrt(h)

  def qkv(self, x_BTD: jax.Array) -> QKV:
    """Returns queries, keys and values of the target [B, T, H, h]."""
    raise NotImplementedError

  def attention_residual(self, x_BTD: jax.Array, a_BTHh: jax.Array) -> jax.Array:
    """Returns the residual, updated by attention to the target."""
    raise NotImplementedError

  def source_q(self, x_BTD: jax.Array) -> jax.Array:
    """Returns queries for attention to the source [B, T, H, h]."""
    raise NotImplementedError

  def source_kv(self, memory_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns keys and values [B, S, H, h] of the encoder's output."""
    raise NotImplementedError

  def source_attention_residual(self, x_BTD: jax.Array, a_BTHh: jax.Array) -> jax.Array:
    """Returns the residual, updated by attention to the source."""
    raise NotImplementedError

  def feed_forward_block(self, x_BTD: jax.Array) -> jax.Array:
    """Returns the residual, updated by the feed-forward."""
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
    """Computes the layer for one new token of each target, all at the same position.

    Returns:
      (residual, (keys, values) of the target with the new ones).
    """
    q_X1Hh, k_X1Hh, v_X1Hh = self.qkv(x_X1D)
    k_XZHh = _write_position(cache.k_XZHh, k_X1Hh, position)
    v_XZHh = _write_position(cache.v_XZHh, v_X1Hh, position)
    X, Z = k_XZHh.shape[:2]
    past_XZ = jnp.broadcast_to(jnp.arange(Z)[None] <= position, (X, Z))
    a_X1Hh = attention.full(q_X1Hh, k_XZHh, v_XZHh, past_XZ, False, self.SCALE, bias_1H1Z)
    x_X1D = self.attention_residual(x_X1D, a_X1Hh)
    q_X1Hh, k_BSHh, v_BSHh = self.source_q(x_X1D), cache.source_k_BSHh, cache.source_v_BSHh
    # The beams of a source are treated as its positions, so its keys are stored only once.
    q_BJHh = q_X1Hh.reshape(len(k_BSHh), -1, *q_X1Hh.shape[2:])
    a_BJHh = attention.full(q_BJHh, k_BSHh, v_BSHh, valid_BS, scale=self.SCALE)
    x_X1D = self.source_attention_residual(x_X1D, a_BJHh.reshape(q_X1Hh.shape))
    return self.feed_forward_block(x_X1D), (k_XZHh, v_XZHh)


def _write_position(old_XZHh: jax.Array, new_X1Hh: jax.Array, position: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(old_XZHh, new_X1Hh.astype(old_XZHh.dtype), position, 1)


class Model(nnx.Module):
  """An encoder-decoder: source and target to hidden states of the target and the unembedding.

  A family declares `layers`, a stack of DecoderLayers, and overrides the methods that raise here.
  """

  layers: DecoderLayer

  def encode(self, source: Any, compute: ComputeConfig) -> tuple[jax.Array, jax.Array | None]:
    """Computes the encoder.

    Args:
      source: Inputs or Sounds; each family narrows the type.
      compute: the settings of the computation.

    Returns:
      (output [B, S, D], mask [B, S] of positions that are not padding, or None for no padding).
    """
    raise NotImplementedError

  def embed_tokens(
    self, tokens_BT: jax.Array, positions_BT: jax.Array, compute: ComputeConfig
  ) -> jax.Array:
    """Returns the first decoder layer's input [B, T, D]."""
    raise NotImplementedError

  def output(self, x_BTD: jax.Array, compute: ComputeConfig, taps_PBTD: jax.Array | None) -> Output:
    """Returns the model's Output, given the output of its last layer."""
    raise NotImplementedError

  def target_bias(self, T: int, compute: ComputeConfig) -> jax.Array | None:
    """Returns the bias of attention scores between target positions, [1, H, T, T], or None."""
    del T, compute
    return None

  def __call__(
    self, inputs: SourceTarget, compute: ComputeConfig, taps: tuple[int, ...] = ()
  ) -> Output:
    """Returns the model's Output, one position per target token.

    Attention to the target needs no padding mask: padding is at the end of a target, and attention
    is causal.

    Args:
      inputs: source and target.
      compute: the settings of the computation.
      taps: decoder layers whose outputs are also returned.
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
    """Returns a cache with the source's keys and values, and room for `size` target tokens."""
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
    """Computes one new token of each target, all at the same position.

    Args:
      tokens_X: int32, the token of each target at the position.
      position: int32 scalar.
      cache: the cache; the positions before `position` must be filled.
      compute: the settings of the computation.

    Returns:
      (Output with T = 1, cache with the new position).
    """
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
    """Returns the queries, keys and values of a decoder layer, given the output before it."""
    del inputs
    return compute.cast_and_gather(take_layer(self.layers, layer)).qkv(x_BTD)
