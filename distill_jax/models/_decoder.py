"""The decoder that most families share: one layer, and the model around the layers.

Read `Block.__call__` and `Model.__call__` first; the functions that they call follow them. A family
subclasses Config (_decoder_config.py) and sets its particulars there. Where that is not enough, it
overrides a method of Block or Model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.models import _rope
from distill_jax.models._declare import Declare
from distill_jax.models._decoder_config import TINY, Config
from distill_jax.models._experts import Experts
from distill_jax.nn import attention, context, embedding, kv_cache, layers, sharding
from distill_jax.nn.params import param, stack, take_layer
from distill_jax.nn.products import product
from distill_jax.types import QKV, Inputs, Output

__all__ = ["TINY", "Block", "Cache", "Config", "LayerStacks", "Model", "PositionInputs", "declare"]

Cache = tuple[kv_cache.LayerCache, ...]  # one entry per layer, with the arrays in Block.CACHE
LayerStacks = tuple[layers.LayerStack, ...]
# (number of a layer, which may be traced) -> (rotary angles, window).
PositionInputs = Callable[[int | jax.Array], tuple[layers.Angles, attention.Window]]


class Block(nnx.Module):
  """One layer: attention, then feed-forward, each with a norm before it and a residual."""

  MLP_NORM = "post_attention_layernorm"  # name of the norm before the feed-forward
  activation: Callable[[jax.Array], jax.Array] = staticmethod(jax.nn.silu)
  # Parts that only some families have; None otherwise.
  experts: Experts | None = None
  attn_post_norm: nnx.Param | None = None  # norm after attention (then there is mlp_post_norm too)
  HAS_DENSE_MLP: ClassVar[bool] = True  # whether there are `gate`, `up` and `down`
  CACHE: ClassVar[dict[str, str]] = {  # arrays of the KV cache, and their axes
    "k": "batch kv_heads head_dim seq",
    "v": "batch kv_heads seq head_dim",
  }

  config: Config

  def __init__(self, c: Config, key: jax.Array):
    declared = declare(key, c)
    self.config = c
    self.attn_norm = declared.rms_norm("input_layernorm", c.hidden_size)
    self.declare_attention(declared)
    self.mlp_norm = declared.rms_norm(self.MLP_NORM, c.hidden_size)
    self.declare_mlp(declared)

  def __call__(
    self,
    x_BTD: jax.Array,
    angles: layers.Angles,
    window: attention.Window,
    segments_BT: jax.Array,
    compute: layers.ComputeConfig,
  ) -> jax.Array:
    with jax.named_scope("attention"):
      a_BTHh = self.attend_heads(x_BTD, angles, window, segments_BT, compute)
      x_BTD = x_BTD + self.project_heads(a_BTHh)
    with jax.named_scope("mlp"):
      return x_BTD + self.feed_forward(x_BTD, compute.rules)

  def declare_attention(self, declare: Declare) -> None:
    c = self.config
    D, H, G, h = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    at, q, kv = "self_attn.", f"embed:{D} heads:{H} head_dim:{h}", f"kv_heads:{G} head_dim:{h}"
    self.q = declare.linear(f"{at}q_proj", q, "heads head_dim")
    self.k = declare.linear(f"{at}k_proj", f"embed:{D} {kv}", "kv_heads head_dim")
    self.v = declare.linear(f"{at}v_proj", f"embed:{D} {kv}", "kv_heads head_dim")
    self.o = declare.linear(f"{at}o_proj", f"heads:{H} head_dim:{h} embed:{D}", "embed")
    if c.QKV_BIAS:
      self.q_bias = declare.bias(f"{at}q_proj", H * h)
      self.k_bias = declare.bias(f"{at}k_proj", G * h)
      self.v_bias = declare.bias(f"{at}v_proj", G * h)
    if c.QK_NORM:
      self.q_norm = declare.rms_norm(f"{at}q_norm", h)
      self.k_norm = declare.rms_norm(f"{at}k_norm", h)

  def declare_mlp(self, declare: Declare) -> None:
    c = self.config
    D, F = c.hidden_size, c.intermediate_size
    self.gate = declare.linear("mlp.gate_proj", f"embed:{D} mlp:{F}", "mlp")
    self.up = declare.linear("mlp.up_proj", f"embed:{D} mlp:{F}", "mlp")
    self.down = declare.linear("mlp.down_proj", f"mlp:{F} embed:{D}", "embed")

  def norm(self, x_BTD: jax.Array, scale: nnx.Param) -> jax.Array:
    c = self.config
    return layers.rms_norm(x_BTD, scale[...], c.rms_norm_eps, c.NORM_OFFSET)

  def qkv(self, x_BTD: jax.Array, angles: layers.Angles) -> QKV:
    """Returns queries [B, T, H, h], keys and values [B, T, G, h] for the layer's input."""
    y_BTD = self.norm(x_BTD, self.attn_norm)
    q_BTHh = product(y_BTD, self.q[...])
    k_BTGh = product(y_BTD, self.k[...])
    v_BTGh = product(y_BTD, self.v[...])
    if self.config.QKV_BIAS:
      q_BTHh = layers.add_head_bias(q_BTHh, self.q_bias[...])
      k_BTGh = layers.add_head_bias(k_BTGh, self.k_bias[...])
      v_BTGh = layers.add_head_bias(v_BTGh, self.v_bias[...])
    if self.config.QK_NORM:
      q_BTHh, k_BTGh = self.norm(q_BTHh, self.q_norm), self.norm(k_BTGh, self.k_norm)
    return layers.rope(q_BTHh, angles), layers.rope(k_BTGh, angles), v_BTGh

  def attend_heads(
    self,
    x_BTD: jax.Array,
    angles: layers.Angles,
    window: attention.Window,
    segments_BT: jax.Array,
    compute: layers.ComputeConfig,
  ) -> jax.Array:
    """Returns the output of the attention heads [B, T, H, h] for the layer's input.

    On a mesh with a context axis, positions are in zig-zag order (see nn/context.py).
    """
    scale, kernel, rules = self.config.attention_scale, compute.attention, compute.rules
    if context.devices() > 1:
      q_BTHh, to_gather, options = self.gathered_qkv(x_BTD, angles)
      return context.attend(q_BTHh, to_gather, segments_BT, window, scale, kernel, rules, **options)
    q_k_v = self.qkv(x_BTD, angles)
    return attention.attention(*q_k_v, segments_BT, window, scale, kernel, rules)

  def gathered_qkv(
    self, x_BTD: jax.Array, angles: layers.Angles
  ) -> tuple[jax.Array, Sequence[jax.Array], dict[str, Any]]:
    """Returns queries, the arrays to gather, and further arguments of `context.attend`."""
    q_BTHh, *k_and_v = self.qkv(x_BTD, angles)
    return q_BTHh, k_and_v, {}

  def project_heads(self, a_BTHh: jax.Array) -> jax.Array:
    """Returns the update of the residual by attention, given the output of its heads."""
    return product(a_BTHh, self.o[...], 2)

  def feed_forward(self, x_BTD: jax.Array, rules: sharding.Rules) -> jax.Array:
    """Returns the update of the residual by the feed-forward."""
    y_BTD = self.norm(x_BTD, self.mlp_norm)
    weights = self.gate[...], self.up[...], self.down[...]
    return layers.gated_mlp(y_BTD, *weights, self.activation)

  def route(self, y_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (ids, weights) [B, T, K] of the experts of each normed position."""
    raise NotImplementedError

  def decode_step(
    self,
    x_BTD: jax.Array,
    angles: layers.Angles,
    window: attention.Window,
    positions_BT: jax.Array,
    slots_BT: jax.Array,
    cache: kv_cache.LayerCache,
    rules: sharding.Rules,
  ) -> tuple[jax.Array, kv_cache.LayerCache]:
    """Computes the layer for T new positions, which attend to a cache.

    Returns:
      (output, cache with the new positions).
    """
    with jax.named_scope("attention"):
      q_BTHh, new = self.project_for_cache(x_BTD, angles)
      cache = kv_cache.write(cache, new, slots_BT, self.CACHE, rules)
      x_BTD = x_BTD + self.project_heads(self.attend_cached(q_BTHh, positions_BT, cache, window))
    with jax.named_scope("mlp"):
      return x_BTD + self.feed_forward(x_BTD, rules), cache

  def project_for_cache(
    self, x_BTD: jax.Array, angles: layers.Angles
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns queries for `attend_cached`, and the arrays to cache [B, T, ...] by name."""
    q_BTHh, k_BTGh, v_BTGh = self.qkv(x_BTD, angles)
    return q_BTHh, {"k": k_BTGh, "v": v_BTGh}

  def attend_cached(
    self,
    q_BTHh: jax.Array,
    positions_BT: jax.Array,
    cache: kv_cache.LayerCache,
    window: attention.Window,
  ) -> jax.Array:
    """Returns the output of the attention heads over a cache."""

    def read(n: int) -> tuple[jax.Array, jax.Array]:
      return self.keys_and_values(kv_cache.read(cache, self.CACHE, q_BTHh.dtype, n))

    sizes, scale = kv_cache.sizes(cache, self.CACHE), self.config.attention_scale
    return attention.cached(q_BTHh, read, sizes, positions_BT, window, scale)

  def keys_and_values(self, cached: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns keys [B, G, h, Z] and values [B, G, Z, width] for a block of a cache."""
    return cached["k"], cached["v"]


class Model(nnx.Module):
  """A decoder: tokens to hidden states and the unembedding."""

  config: Config

  def __init__(self, c: Config, key: jax.Array):
    keys = jax.random.split(key, 4)
    V, D = c.vocab_size, c.hidden_size
    self.config = c
    self.embed = param(
      keys[0], f"vocab:{V} table:{D}", "model.embed_tokens.weight", "vocab", init=0.02
    )
    first = 0
    for name, block, size in self.layer_stacks(c):
      stack_key = jax.random.fold_in(keys[1], first) if first else keys[1]
      setattr(self, name, stack(size, functools.partial(block, c), stack_key, first=first))
      first += size
    self.norm = declare(keys[2], c, "model.").rms_norm("norm", D)
    if not c.tie_word_embeddings:
      self.head = param(keys[3], f"vocab:{V} embed:{D}", "lm_head.weight", "vocab")

  @staticmethod
  def layer_stacks(c: Any) -> LayerStacks:
    """Returns the stacks of layers of one kind, in the order of the layers.

    Args:
      c: the family's Config; each family narrows its type.
    """
    return (layers.LayerStack("layers", Block, c.num_hidden_layers),)

  def __call__(
    self, inputs: Inputs, compute: layers.ComputeConfig, taps: tuple[int, ...] = ()
  ) -> Output:
    """Returns the model's Output; see types.Model."""
    return self.from_embeddings(
      *self.embed_tokens(inputs.tokens_BT, compute), inputs, compute, taps
    )

  def embed_tokens(
    self, tokens_BT: jax.Array, compute: layers.ComputeConfig
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the first layer's input [B, T, D], and the embedding table [V, D]."""
    with jax.named_scope("embed"):
      embed_VD = compute.cast_and_gather(self.embed)[...]
      axes = self.embed.get_metadata()["axes"]
      x_BTD = embedding.lookup(embed_VD, tokens_BT, axes, compute.rules)
      x_BTD = sharding.constrain(x_BTD, "batch seq embed", compute.rules)
      if self.config.embed_scale != 1:
        x_BTD = x_BTD * jnp.asarray(self.config.embed_scale, x_BTD.dtype)
      return x_BTD, embed_VD

  def from_embeddings(
    self,
    x_BTD: jax.Array,
    embed_VD: jax.Array,
    inputs: Inputs,
    compute: layers.ComputeConfig,
    taps: tuple[int, ...] = (),
  ) -> Output:
    """Returns the model's Output for embeddings [B, T, D] that were computed by the caller."""
    x_BTD = context.to_zigzag(x_BTD, "batch seq embed", compute.rules)
    inputs = context.to_zigzag(inputs, "batch seq", compute.rules)
    position_inputs = self.position_inputs(inputs)

    def apply(layer: Block, i: jax.Array, x_BTD: jax.Array) -> jax.Array:
      return layer(x_BTD, *position_inputs(i), inputs.segments_BT, compute)

    stacks = [getattr(self, stack.name) for stack in self.layer_stacks(self.config)]
    x_BTD, taps_PBTD = layers.scan_layers(stacks, apply, x_BTD, taps, compute)
    x_BTD = context.from_zigzag(x_BTD, "batch seq embed", compute.rules)
    taps_PBTD = context.from_zigzag(taps_PBTD, "pairs batch seq embed", compute.rules)
    return self.output(x_BTD, embed_VD, compute, taps_PBTD)

  def position_inputs(self, inputs: Inputs) -> PositionInputs:
    """Returns a function from a layer's number to its rotary angles and window."""
    c = self.config
    freq = _rope.frequencies(c.rope_theta, c.rope_dim, c.rope_scaling)
    angles = layers.rope_angles(inputs.positions_BT, freq, _rope.amplitude(c.rope_scaling))
    return lambda layer: (angles, c.window)

  def output(
    self,
    x_BTD: jax.Array,
    embed_VD: jax.Array,
    compute: layers.ComputeConfig,
    taps_PBTD: jax.Array | None = None,
  ) -> Output:
    """Returns the model's Output, given the output of the last layer."""
    c = self.config
    x_BTD = layers.rms_norm(x_BTD, self.norm[...], c.rms_norm_eps, c.NORM_OFFSET)
    head_VD = embed_VD if c.tie_word_embeddings else compute.cast_and_gather(self.head)[...]
    return Output(x_BTD, head_VD, c.soft_cap, taps_PBTD)

  def decode_step(
    self, blocks: Sequence[Block], inputs: Inputs, cache: Cache, compute: layers.ComputeConfig
  ) -> tuple[Output, Cache]:
    """Computes the model for T new positions per row, which attend to a cache.

    Args:
      blocks: the separate layers, instead of the model's stacks (generation/unrolled.py).
      inputs: int32 [B, T]. Position p of a row is stored in slot p of the cache. Positions with
        segment 0 are padding and are not stored.
      cache: one entry per layer, with the arrays in Block.CACHE. The slots before a position must
        be filled.
      compute: the settings of the computation.

    Returns:
      (Output, cache with the new positions).
    """
    x_BTD, embed_VD = self.embed_tokens(inputs.tokens_BT, compute)
    position_inputs, new_cache = self.position_inputs(inputs), []
    past_the_end = jnp.iinfo(jnp.int32).max  # a slot that no cache has, so nothing is stored
    slots_BT = jnp.where(inputs.segments_BT > 0, inputs.positions_BT, past_the_end)
    for i, block in enumerate(blocks):
      x_BTD, layer_cache = compute.cast_and_gather(block).decode_step(
        x_BTD, *position_inputs(i), inputs.positions_BT, slots_BT, cache[i], compute.rules
      )
      new_cache.append(layer_cache)
      x_BTD = sharding.constrain(x_BTD, "batch seq embed", compute.rules)
    return self.output(x_BTD, embed_VD, compute), tuple(new_cache)

  def qkv(self, layer: int, x_BTD: jax.Array, inputs: Inputs, compute: layers.ComputeConfig) -> QKV:
    """Returns the queries, keys and values of one layer, given the output of the layer before."""
    first = 0
    for name, _, size in self.layer_stacks(self.config):
      if first <= layer < first + size:
        block = take_layer(getattr(self, name), layer - first)
      first += size
    return compute.cast_and_gather(block).qkv(x_BTD, self.position_inputs(inputs)(layer)[0])


def declare(key: jax.Array, c: Config, prefix: str = "model.layers.{layers}.") -> Declare:
  """Returns a Declare for the parameters of a decoder, by default of one of its layers."""
  return Declare(key, prefix, rms_init="zeros" if c.NORM_OFFSET else "ones")
