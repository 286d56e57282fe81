"""The decoder that families share: config.json, a layer, the model around the layers.

A family subclasses Config, and sets there what tells it apart; where that is not enough,
it overrides a method of Block or Model.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.errors import InputError
from distill_jax.models import _rope
from distill_jax.nn import attention, kv_cache, layers, sharding
from distill_jax.nn.params import param, stack, unstack
from distill_jax.types import Inputs, Output

Cache = tuple[kv_cache.LayerCache, ...]  # for each layer, by Block.CACHE

# Buffers that older checkpoints hold; they follow from the config.
BUFFERS = re.compile(r".*\.rotary_emb\.inv_freq")
TINY: dict[str, Any] = {  # the smallest model of every family
  "vocab_size": 256,
  "hidden_size": 32,
  "intermediate_size": 64,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 8,
  "max_position_embeddings": 128,
  "tie_word_embeddings": True,
}


@dataclasses.dataclass(frozen=True)
class Config:
  """The shape of a model, in Hugging Face's words."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  max_position_embeddings: int
  rms_norm_eps: float = 1e-5
  rope_theta: float = 10_000.0
  rope_scaling: _rope.Scaling | None = None
  tie_word_embeddings: bool = False

  # Of a family, not of a model: what it writes into config.json, and how it computes.
  MODEL_TYPE: ClassVar[str]
  ARCHITECTURE: ClassVar[str]
  SUPPORTED_VALUES: ClassVar[dict[str, Any]] = {"hidden_act": "silu"}  # the only values it can do
  QKV_BIAS: ClassVar[bool] = False
  QK_NORM: ClassVar[bool] = False  # of each head, before rope
  NORM_OFFSET: ClassVar[float] = 0.0  # added to the scale of a norm
  OPTIONAL_ZERO: ClassVar[tuple[str, ...]] = ()  # fields

  def __post_init__(self):
    _rope.check_numbers(self, self.OPTIONAL_ZERO)
    if self.rope_dim % 2:
      raise InputError(
        f"head_dim is {self.head_dim} and rope turns {self.rope_dim} of it; that has to be even"
      )
    if self.num_attention_heads % self.num_key_value_heads:
      raise InputError(
        f"{self.num_attention_heads} attention heads do not divide over "
        f"{self.num_key_value_heads} key/value heads"
      )

  @classmethod
  def from_hf(cls, hf: dict[str, Any]) -> Self:
    """From a Hugging Face config.json; what this family cannot do is refused by name."""
    for key, want in cls.SUPPORTED_VALUES.items():
      if hf.get(key, want) != want:
        raise InputError(
          f"config.json has {key}={hf[key]!r}; the {cls.MODEL_TYPE} family has {want!r} only"
        )
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    heads = hf["num_attention_heads"]
    values: dict[str, Any] = {
      "num_key_value_heads": hf.get("num_key_value_heads") or heads,
      "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
      "rms_norm_eps": hf["rms_norm_eps"],
      "rope_theta": rope.get("rope_theta", hf.get("rope_theta", 10_000.0)),
      "rope_scaling": _rope.read(rope),
    }
    for f in dataclasses.fields(cls):
      if f.name not in values and (f.name in hf or f.default is dataclasses.MISSING):
        values[f.name] = hf[f.name]
      if f.type in ("float", "float | None") and type(values.get(f.name)) is int:
        values[f.name] = float(values[f.name])
    return cls(**values)

  def to_hf(self) -> dict[str, Any]:
    """The config.json of this model."""
    hf = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    theta, scaling = hf.pop("rope_theta"), _rope.write(hf.pop("rope_scaling"))
    return {
      "architectures": [self.ARCHITECTURE],
      "model_type": self.MODEL_TYPE,
      "attention_dropout": 0.0,
      "initializer_range": 0.02,
      "use_cache": True,
      **self.SUPPORTED_VALUES,
      **hf,
      # The first key is read by transformers 5, the two others by older ones and by vLLM.
      "rope_parameters": {**scaling, "rope_theta": theta},
      "rope_theta": theta,
      "rope_scaling": scaling if self.rope_scaling else None,
    }

  def keep_layers(self, kept: tuple[int, ...]) -> Self:
    """The config of a model that has these layers of this one, in this order."""
    return dataclasses.replace(self, num_hidden_layers=len(kept))

  def ignores_tensor(self, name: str) -> bool:
    """Whether a checkpoint may hold this tensor although the model has no use for it."""
    return BUFFERS.fullmatch(name) is not None

  @property
  def head_rows(self) -> int:
    """How many outcomes the model's head can tell apart."""
    return self.vocab_size

  @property
  def rope_dim(self) -> int:
    """How much of a head rope turns."""
    return self.head_dim

  @property
  def window(self) -> int | None:
    """How many positions, its own among them, a position attends to; None: all."""
    return None

  def window_at(self, layer: int) -> int | None:
    """The window of one layer; None where it attends to all positions."""
    return self.window

  @property
  def attention_width(self) -> int:
    """Multiply-adds of a query head for one position attended to: its score and its value."""
    return 2 * self.head_dim

  @property
  def decode_attention_width(self) -> int:
    """The same in decoding, over what the cache holds."""
    return self.attention_width

  @property
  def cache_width(self) -> int:
    """Numbers that one layer's cache holds of a position."""
    return 2 * self.num_key_value_heads * self.head_dim

  @property
  def expert_groups(self) -> int:
    """Groups of equally many experts that the router chooses among."""
    return 1

  @property
  def attention_scale(self) -> float:
    return self.head_dim**-0.5

  @property
  def soft_cap(self) -> float | None:
    """Of the logits."""
    return None

  @property
  def embed_scale(self) -> float:
    return 1.0


class Declare:
  """Parameters of one layer, each with a key of its own."""

  def __init__(self, key: jax.Array, c: Config, at: str = "model.layers.{layers}."):
    self._keys, self._at = iter(jax.random.split(key, 20)), at
    self._ones = "zeros" if c.NORM_OFFSET else "ones"

  def norm(self, name: str, width: int):
    return param(next(self._keys), f"norm:{width}", f"{self._at}{name}.weight", init=self._ones)

  def linear(self, name: str, dims: str, out: str):
    return param(next(self._keys), dims, f"{self._at}{name}.weight", out)

  def bias(self, name: str, width: int, exact: bool = False):
    """Flat, with the axis that tells optim.py not to decay it."""
    return param(next(self._keys), f"bias:{width}", f"{self._at}{name}", init="zeros", exact=exact)


class Block(nnx.Module):
  """One layer: attention, then feed-forward, each normed and added to the residual."""

  MLP_NORM = "post_attention_layernorm"  # the name of the norm before the feed-forward
  activation: Callable[[jax.Array], jax.Array] = staticmethod(jax.nn.silu)
  CACHE: ClassVar[dict[str, str]] = {  # what is kept of positions, and its axes there
    "k": "batch kv_heads head_dim seq",
    "v": "batch kv_heads seq head_dim",
  }

  def __init__(self, c: Any, key: jax.Array):
    declare = Declare(key, c)
    self.config = c
    self.attn_norm = declare.norm("input_layernorm", c.hidden_size)
    self.declare_attention(c, declare)
    self.mlp_norm = declare.norm(self.MLP_NORM, c.hidden_size)
    self.declare_mlp(c, declare)

  def declare_attention(self, c: Any, declare: Declare) -> None:
    D, H, G, h = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
    at, q, kv = "self_attn.", f"embed:{D} heads:{H} head_dim:{h}", f"kv_heads:{G} head_dim:{h}"
    self.q = declare.linear(f"{at}q_proj", q, "heads head_dim")
    self.k = declare.linear(f"{at}k_proj", f"embed:{D} {kv}", "kv_heads head_dim")
    self.v = declare.linear(f"{at}v_proj", f"embed:{D} {kv}", "kv_heads head_dim")
    self.o = declare.linear(f"{at}o_proj", f"heads:{H} head_dim:{h} embed:{D}", "embed")
    if c.QKV_BIAS:
      self.q_bias = declare.bias(f"{at}q_proj.bias", H * h)
      self.k_bias = declare.bias(f"{at}k_proj.bias", G * h)
      self.v_bias = declare.bias(f"{at}v_proj.bias", G * h)
    if c.QK_NORM:
      self.q_norm = declare.norm(f"{at}q_norm", h)
      self.k_norm = declare.norm(f"{at}k_norm", h)

  def declare_mlp(self, c: Any, declare: Declare) -> None:
    D, F = c.hidden_size, c.intermediate_size
    self.gate = declare.linear("mlp.gate_proj", f"embed:{D} mlp:{F}", "mlp")
    self.up = declare.linear("mlp.up_proj", f"embed:{D} mlp:{F}", "mlp")
    self.down = declare.linear("mlp.down_proj", f"mlp:{F} embed:{D}", "embed")

  def norm(self, x_BTD: jax.Array, scale: Any) -> jax.Array:
    c = self.config
    return layers.rms_norm(x_BTD, scale[...], c.rms_norm_eps, c.NORM_OFFSET)

  def qkv(self, x_BTD: jax.Array, angles: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, T, H, h], keys and values [B, T, G, h] from the layer's input."""
    y_BTD = self.norm(x_BTD, self.attn_norm)
    q_BTHh = jnp.einsum("BTD,DHh->BTHh", y_BTD, self.q[...])
    k_BTGh = jnp.einsum("BTD,DGh->BTGh", y_BTD, self.k[...])
    v_BTGh = jnp.einsum("BTD,DGh->BTGh", y_BTD, self.v[...])
    if self.config.QKV_BIAS:
      biased = lambda x, b: x + b[...].reshape(1, 1, *x.shape[2:])
      q_BTHh, k_BTGh = biased(q_BTHh, self.q_bias), biased(k_BTGh, self.k_bias)
      v_BTGh = biased(v_BTGh, self.v_bias)
    if self.config.QK_NORM:
      q_BTHh, k_BTGh = self.norm(q_BTHh, self.q_norm), self.norm(k_BTGh, self.k_norm)
    return layers.rope(q_BTHh, angles), layers.rope(k_BTGh, angles), v_BTGh

  def attend(
    self, x_BTD, angles: Any, window: attention.Window, segments_BT, compute: layers.ComputeConfig
  ) -> jax.Array:
    """What attention adds to the residual."""
    return self.project_heads(self.attend_heads(x_BTD, angles, window, segments_BT, compute))

  def attend_heads(
    self, x_BTD, angles: Any, window: attention.Window, segments_BT, compute: layers.ComputeConfig
  ) -> jax.Array:
    """What the heads read from the layer's input, [B, T, H, h]."""
    return attention.attention(
      *self.qkv(x_BTD, angles),
      segments_BT,
      window,
      self.config.attention_scale,
      compute.attention,
      compute.rules,
    )

  def project_heads(self, a_BTHh: jax.Array) -> jax.Array:
    """What attention adds to the residual, from what its heads have read."""
    return jnp.einsum("BTHh,HhD->BTD", a_BTHh, self.o[...])

  def project_for_cache(
    self, x_BTD: jax.Array, angles: Any
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Queries for `attend_cached`, and what a cache keeps [B, T, ...], by its name in CACHE."""
    q_BTHh, k_BTGh, v_BTGh = self.qkv(x_BTD, angles)
    return q_BTHh, {"k": k_BTGh, "v": v_BTGh}

  def attend_cached(self, q_BTHh, positions_BT, kept: dict[str, jax.Array], window) -> jax.Array:
    """What the heads read from S kept positions, as `project_heads` takes it."""
    scale = self.config.attention_scale
    return attention.cached(q_BTHh, kept["k"], kept["v"], positions_BT, window, scale)

  def decode_step(
    self,
    x_BTD,
    angles: Any,
    window: attention.Window,
    positions_BT,
    slots_BT,
    kept: dict[str, jax.Array],
    rules: sharding.Rules,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The layer of T new positions that see what is kept: (its output, what is kept now)."""
    with jax.named_scope("attention"):
      q_BTHh, new = self.project_for_cache(x_BTD, angles)
      kept = kv_cache.write(kept, new, slots_BT, self.CACHE, rules)
      seen = kv_cache.read(kept, self.CACHE, x_BTD.dtype)
      x_BTD = x_BTD + self.project_heads(self.attend_cached(q_BTHh, positions_BT, seen, window))
    with jax.named_scope("mlp"):
      return x_BTD + self.feed_forward(x_BTD, rules), kept

  def feed_forward(self, x_BTD: jax.Array, rules: sharding.Rules) -> jax.Array:
    """What the feed-forward adds to the residual."""
    y_BTD = self.norm(x_BTD, self.mlp_norm)
    weights = self.gate[...], self.up[...], self.down[...]
    return layers.gated_mlp(y_BTD, *weights, self.activation)

  def __call__(
    self, x_BTD, angles: Any, window: attention.Window, segments_BT, compute: layers.ComputeConfig
  ) -> jax.Array:
    with jax.named_scope("attention"):
      x_BTD = x_BTD + self.attend(x_BTD, angles, window, segments_BT, compute)
    with jax.named_scope("mlp"):
      return x_BTD + self.feed_forward(x_BTD, compute.rules)


class Model(nnx.Module):
  """Tokens in, hidden states and the unembedding out."""

  def __init__(self, c: Any, key: jax.Array):
    keys = jax.random.split(key, 4)
    V, D = c.vocab_size, c.hidden_size
    self.config = c
    self.embed = param(
      keys[0], f"vocab:{V} table:{D}", "model.embed_tokens.weight", "vocab", init=0.02
    )
    first = 0
    for name, block, n in self.layer_stacks(c):
      stack_key = jax.random.fold_in(keys[1], first) if first else keys[1]
      setattr(self, name, stack(n, functools.partial(block, c), stack_key, first=first))
      first += n
    self.norm = Declare(keys[2], c, "model.").norm("norm", D)
    if not c.tie_word_embeddings:
      self.head = param(keys[3], f"vocab:{V} embed:{D}", "lm_head.weight", "vocab")

  @staticmethod
  def layer_stacks(c: Any) -> tuple[tuple[str, type[Block], int], ...]:
    """The stacks of layers alike, from the first layer up: (attribute, Block, how many)."""
    return (("layers", Block, c.num_hidden_layers),)

  def position_inputs(self, inputs: Inputs) -> Callable[[Any], tuple[Any, attention.Window]]:
    """Of a layer's number, perhaps traced: its (rotary angles, window)."""
    c = self.config
    freq = _rope.frequencies(c.rope_theta, c.rope_dim, c.rope_scaling)
    angles = layers.rope_angles(inputs.positions_BT, freq, _amplitude(c.rope_scaling))
    return lambda layer: (angles, c.window)

  def __call__(
    self, inputs: Inputs, compute: layers.ComputeConfig, taps: tuple[int, ...] = ()
  ) -> Output:
    """Args: inputs, int32 [B, T]; taps, the layers whose output is kept. Returns: Output."""
    return self.from_embeddings(
      *self.embed_tokens(inputs.tokens_BT, compute), inputs, compute, taps
    )

  def from_embeddings(
    self,
    x_BTD: jax.Array,
    embed_VD: jax.Array,
    inputs: Inputs,
    compute: layers.ComputeConfig,
    taps: tuple[int, ...] = (),
  ) -> Output:
    """The model above its embeddings: `__call__`, for what is embedded otherwise."""
    position_inputs = self.position_inputs(inputs)
    x_BTD, taps_PBTD = layers.scan_layers(
      [getattr(self, name) for name, _, _ in self.layer_stacks(self.config)],
      lambda layer, i, x: layer(x, *position_inputs(i), inputs.segments_BT, compute),
      x_BTD,
      taps,
      compute,
    )
    return self.output(x_BTD, embed_VD, compute, taps_PBTD)

  def decode_step(
    self, blocks: Sequence[Block], inputs: Inputs, cache: Cache, compute: layers.ComputeConfig
  ) -> tuple[Output, Cache]:
    """The model of T more positions a row, which see those that a cache holds.

    Args:
      blocks: the layers one by one, in the stead of the model's stacks (decode/unroll.py).
      inputs: int32 [B, T]. A row keeps its position p in slot p of the cache; what has
        segment 0 is padding, and is not kept.
      cache: for each layer, arrays by name, as its CACHE says; slots up to a position are
        filled before it is read.

    Returns: Output, and the cache with the new positions in it.
    """
    x_BTD, embed_VD = self.embed_tokens(inputs.tokens_BT, compute)
    position_inputs, now = self.position_inputs(inputs), []
    past = jnp.iinfo(jnp.int32).max  # the end of any cache
    slots_BT = jnp.where(inputs.segments_BT > 0, inputs.positions_BT, past)
    for i, block in enumerate(blocks):
      x_BTD, kept = compute.cast_and_gather(block).decode_step(
        x_BTD, *position_inputs(i), inputs.positions_BT, slots_BT, cache[i], compute.rules
      )
      now.append(kept)
      x_BTD = sharding.constrain(x_BTD, "batch seq embed", compute.rules)
    return self.output(x_BTD, embed_VD, compute), tuple(now)

  def embed_tokens(
    self, tokens_BT: jax.Array, compute: layers.ComputeConfig
  ) -> tuple[jax.Array, jax.Array]:
    """What the first layer reads, and the table."""
    with jax.named_scope("embed"):
      embed_VD = compute.cast_and_gather(self.embed)[...]
      x_BTD = sharding.constrain(embed_VD[tokens_BT], "batch seq embed", compute.rules)
      if self.config.embed_scale != 1:
        x_BTD = x_BTD * jnp.asarray(self.config.embed_scale, x_BTD.dtype)
      return x_BTD, embed_VD

  def output(self, x_BTD, embed_VD, compute: layers.ComputeConfig, taps_PBTD=None) -> Output:
    """What the model says, from what its last layer does."""
    c = self.config
    x_BTD = layers.rms_norm(x_BTD, self.norm[...], c.rms_norm_eps, c.NORM_OFFSET)
    head_VD = embed_VD if c.tie_word_embeddings else compute.cast_and_gather(self.head)[...]
    return Output(x_BTD, head_VD, c.soft_cap, taps_PBTD)

  def qkv(self, layer: int, x_BTD: jax.Array, inputs: Inputs, compute: layers.ComputeConfig):
    """Queries, keys and values of one layer, from the output of the layer before it."""
    first = 0
    for name, _, n in self.layer_stacks(self.config):
      if first <= layer < first + n:
        here = jax.tree.map(lambda w, i=layer - first: w[i], getattr(self, name))
      first += n
    return compute.cast_and_gather(unstack(here)).qkv(x_BTD, self.position_inputs(inputs)(layer)[0])


def _amplitude(scaling: Any) -> float:
  return scaling.amplitude if isinstance(scaling, _rope.Yarn) else 1.0
