"""The layer that encoders share: attention and feed-forward with biases and layer norms.

BERT has its norms after attention and feed-forward, other families have them before. A family sets
the Hugging Face names of the parts, and adds its embeddings and its head.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, Self, TypeVar

import jax
from flax import nnx

from distill_jax.errors import bad_value, check_choice
from distill_jax.models._declare import Declare
from distill_jax.models._family import FamilyDefaults, check_numbers
from distill_jax.nn import attention, layers
from distill_jax.nn.products import product, recomputed
from distill_jax.types import QKV, JsonObject


def _quick_gelu(x: jax.Array) -> jax.Array:
  return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_new": jax.nn.gelu,
  "gelu_pytorch_tanh": jax.nn.gelu,
  "quick_gelu": _quick_gelu,
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
  "swish": jax.nn.silu,
}


def check_activation(name: str) -> None:
  """Checks that an activation is supported.

  Raises:
    InputError: it is not one of ACTIVATIONS.
  """
  check_choice("hidden_act", name, ACTIVATIONS, "Use another model")


@dataclasses.dataclass(frozen=True)
class Config(FamilyDefaults):
  """The architecture of a stack of layers, under Hugging Face's field names."""

  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  hidden_act: str = "gelu"
  layer_norm_eps: float = 1e-12

  OPTIONAL_ZERO: ClassVar[tuple[str, ...]] = ()  # fields that may be 0

  def __post_init__(self):
    check_numbers(self, self.OPTIONAL_ZERO)
    if self.hidden_size % self.num_attention_heads:
      expected = f"a multiple of num_attention_heads, {self.num_attention_heads}"
      raise bad_value("hidden_size", self.hidden_size, expected, "Correct the model's config")
    check_activation(self.hidden_act)

  @property
  def head_dim(self) -> int:
    return self.hidden_size // self.num_attention_heads

  @property
  def value_head_dim(self) -> int:
    return self.head_dim

  @property
  def num_key_value_heads(self) -> int:
    return self.num_attention_heads

  def keep_layers(self, kept: tuple[int, ...]) -> Self:
    """Returns the config of a model with only these layers, in this order."""
    return dataclasses.replace(self, num_hidden_layers=len(kept))


@dataclasses.dataclass(frozen=True)
class VisionConfig(Config):
  """The architecture of an encoder of square images, split into square patches."""

  image_size: int = 224
  patch_size: int = 16
  num_channels: int = 3

  def __post_init__(self):
    super().__post_init__()
    if self.image_size % self.patch_size:
      expected = f"a divisor of image_size, {self.image_size}"
      raise bad_value("patch_size", self.patch_size, expected, "Correct the model's config")

  @property
  def num_patches(self) -> int:
    return (self.image_size // self.patch_size) ** 2


ConfigT = TypeVar("ConfigT", bound=Config)


def config_of_part(cls: type[ConfigT], hf: JsonObject) -> ConfigT:
  """Returns a Config from a part of config.json, with defaults for missing fields."""
  return cls(**{f.name: hf[f.name] for f in dataclasses.fields(cls) if f.name in hf})


def num_labels_of(hf: JsonObject) -> int:
  """Returns the number of classes in a config.json: 2 without class names, as in transformers."""
  return len(hf["id2label"]) if "id2label" in hf else 2


def label_names(n: int) -> JsonObject:
  """Returns the entries of config.json for n unnamed classes."""
  return {
    "id2label": {str(i): f"LABEL_{i}" for i in range(n)},
    "label2id": {f"LABEL_{i}": i for i in range(n)},
  }


def heads_of(x_BSD: jax.Array, weight: nnx.Param, bias: nnx.Param | None = None) -> jax.Array:
  """Projects hidden states [B, S, D] to heads [B, S, H, h]."""
  y_BSHh = product(x_BSD, weight[...])
  return y_BSHh if bias is None else layers.add_head_bias(y_BSHh, bias[...])


class Block(nnx.Module):
  """One layer. A subclass sets the Hugging Face names of its parts."""

  NAMES: ClassVar[dict[str, str]]  # names of q, k, v, o, attn_norm, up, down and mlp_norm
  PRE_NORM: ClassVar[bool] = True  # whether norms precede attention and feed-forward
  CAUSAL: ClassVar[bool] = False
  KEY_BIAS: ClassVar[bool] = True

  def __init__(self, c: Config, at: str, key: jax.Array):
    declare, names = Declare(key, at), self.NAMES
    D, H, h, F = c.hidden_size, c.num_attention_heads, c.head_dim, c.intermediate_size
    self.config = c
    self.q, self.k, self.v = (
      declare.linear(names[n], f"embed:{D} heads:{H} head_dim:{h}", "heads head_dim") for n in "qkv"
    )
    self.q_bias, self.v_bias = (declare.bias(names[n], D) for n in "qv")
    if self.KEY_BIAS:
      self.k_bias = declare.bias(names["k"], D)
    self.o = declare.linear(names["o"], f"heads:{H} head_dim:{h} embed:{D}", "embed")
    self.o_bias = declare.bias(names["o"], D)
    self.attn_norm, self.attn_norm_bias = declare.layer_norm(names["attn_norm"], D)
    self.up = declare.linear(names["up"], f"embed:{D} mlp:{F}", "mlp")
    self.up_bias = declare.bias(names["up"], F)
    self.down = declare.linear(names["down"], f"mlp:{F} embed:{D}", "embed")
    self.down_bias = declare.bias(names["down"], D)
    self.mlp_norm, self.mlp_norm_bias = declare.layer_norm(names["mlp_norm"], D)

  def qkv(self, x_BSD: jax.Array) -> QKV:
    """Returns queries, keys and values [B, S, H, h] for the layer's input."""
    y_BSD = self.norm_attn(x_BSD) if self.PRE_NORM else x_BSD
    k_BSHh = heads_of(y_BSD, self.k, self.k_bias if self.KEY_BIAS else None)
    return heads_of(y_BSD, self.q, self.q_bias), k_BSHh, heads_of(y_BSD, self.v, self.v_bias)

  def attend(self, x_BSD: jax.Array, valid_BS: jax.Array | None) -> jax.Array:
    """Returns the update of the residual by attention."""
    a_BSHh = attention.full(*self.qkv(x_BSD), valid_BS, self.CAUSAL)
    return product(a_BSHh, self.o[...], 2) + self.o_bias[...][None, None]

  def feed_forward(self, x_BSD: jax.Array) -> jax.Array:
    """Returns the update of the residual by the feed-forward, given its normed input."""
    h_BSF = product(x_BSD, self.up[...]) + self.up_bias[...][None, None]
    h_BSF = recomputed(ACTIVATIONS[self.config.hidden_act], h_BSF)
    return product(h_BSF, self.down[...]) + self.down_bias[...][None, None]

  def norm_attn(self, x_BSD: jax.Array) -> jax.Array:
    eps = self.config.layer_norm_eps
    return layers.layer_norm(x_BSD, self.attn_norm[...], self.attn_norm_bias[...], eps)

  def norm_mlp(self, x_BSD: jax.Array) -> jax.Array:
    eps = self.config.layer_norm_eps
    return layers.layer_norm(x_BSD, self.mlp_norm[...], self.mlp_norm_bias[...], eps)

  def __call__(self, x_BSD: jax.Array, valid_BS: jax.Array | None) -> jax.Array:
    with jax.named_scope("attention"):
      x_BSD = x_BSD + self.attend(x_BSD, valid_BS)
      x_BSD = x_BSD if self.PRE_NORM else self.norm_attn(x_BSD)
    with jax.named_scope("mlp"):
      y_BSD = self.norm_mlp(x_BSD) if self.PRE_NORM else x_BSD
      x_BSD = x_BSD + self.feed_forward(y_BSD)
      return x_BSD if self.PRE_NORM else self.norm_mlp(x_BSD)
