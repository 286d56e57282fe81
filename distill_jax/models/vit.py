"""ViT (arXiv:2010.11929): images, split into patches, to classes."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.errors import bad_value
from distill_jax.models import _encoder, _patches
from distill_jax.models._declare import Declare
from distill_jax.nn import layers, sharding
from distill_jax.nn.params import param, stack, take_layer
from distill_jax.types import QKV, Images, JsonObject, Output

HF_MODEL_TYPES = ("vit",)  # model_type in config.json
PREFIX = "vit."  # of all tensors except the head's; absent in checkpoints without a head


@dataclasses.dataclass(frozen=True)
class Config(_encoder.VisionConfig):
  """A model's architecture, under Hugging Face's field names. Dropout is 0."""

  num_labels: int = 2

  MODEL_TYPE: ClassVar[str] = "vit"
  ARCHITECTURE: ClassVar[str] = "ViTForImageClassification"
  TOKENS: ClassVar[int] = 1  # number of tokens before the patches

  @classmethod
  def from_hf(cls, hf: JsonObject) -> Self:
    """Returns the config for a Hugging Face config.json; unsupported values raise InputError."""
    if not hf.get("qkv_bias", True):
      expected = f"True, the only value that the {cls.MODEL_TYPE} family supports"
      raise bad_value("qkv_bias in config.json", False, expected, "Use another model")
    names = {f.name for f in dataclasses.fields(cls)} - {"num_labels"}
    return cls(**{n: hf[n] for n in names if n in hf}, num_labels=_encoder.num_labels_of(hf))

  def to_hf(self) -> JsonObject:
    """Returns the config.json of this model."""
    hf = dataclasses.asdict(self)
    return {
      "architectures": [self.ARCHITECTURE],
      "model_type": self.MODEL_TYPE,
      "qkv_bias": True,
      "attention_probs_dropout_prob": 0.0,
      "hidden_dropout_prob": 0.0,
      "initializer_range": 0.02,
      **_encoder.label_names(hf.pop("num_labels")),
      **hf,
    }

  def ignores_tensor(self, name: str) -> bool:
    """Returns whether a checkpoint may hold this tensor although the model does not use it."""
    return ".pooler." in f".{name}" or name.endswith("embeddings.mask_token")

  @property
  def head_rows(self) -> int:
    return self.num_labels

  @property
  def positions(self) -> int:
    """Number of positions: the tokens before the patches, and the patches."""
    return self.TOKENS + self.num_patches


class Block(_encoder.Block):
  """One layer, with norms before attention and before the feed-forward."""

  NAMES = {
    "q": "attention.attention.query",
    "k": "attention.attention.key",
    "v": "attention.attention.value",
    "o": "attention.output.dense",
    "attn_norm": "layernorm_before",
    "up": "intermediate.dense",
    "down": "output.dense",
    "mlp_norm": "layernorm_after",
  }


class Body(nnx.Module):
  """The classifier without its head: images to hidden states of tokens and patches."""

  TOKENS: ClassVar[tuple[str, ...]] = ("cls_token",)  # tokens before the patches

  def __init__(self, c: Config, prefix: str, key: jax.Array):
    keys, at = iter(jax.random.split(key, 4 + len(self.TOKENS))), f"{prefix}embeddings."
    D, M, p = c.hidden_size, c.num_channels, c.patch_size
    self.config = c
    for name in self.TOKENS:
      setattr(self, name, param(next(keys), f"one:1 one:1 table:{D}", at + name, init=0.02))
    dims = f"one:1 places:{c.positions} table:{D}"
    self.places = param(next(keys), dims, f"{at}position_embeddings", init=0.02)
    patch = Declare(next(keys), at + "patch_embeddings.")
    # In torch's layout of a convolution: [out, in, height, width].
    dims = f"embed:{D} channels:{M} pixels:{p} pixels:{p}"
    self.patch = patch.linear("projection", dims, "", init=(M * p * p) ** -0.5)
    self.patch_bias = patch.bias("projection", D)
    block = functools.partial(Block, c, prefix + "encoder.layer.{layers}.")
    self.layers = stack(c.num_hidden_layers, block, next(keys))
    self.norm, self.norm_bias = Declare(next(keys), prefix).layer_norm("layernorm", D)

  def __call__(
    self, inputs: Images, compute: layers.ComputeConfig, taps: tuple[int, ...] = ()
  ) -> tuple[jax.Array, jax.Array | None]:
    """Returns the last layer's output [B, S, D], normed, and the taps."""
    with jax.named_scope("embed"):
      x_BSD = self.embed_patches(inputs.pixels_BYWM, compute)
      x_BSD = sharding.constrain(x_BSD, "batch seq embed", compute.rules)
    x_BSD, taps_PBSD = layers.scan_layers(
      [self.layers], lambda layer, i, x: layer(x, None), x_BSD, taps, compute
    )
    eps = self.config.layer_norm_eps
    return layers.layer_norm(x_BSD, self.norm[...], self.norm_bias[...], eps), taps_PBSD

  def embed_patches(self, pixels_BYWM: jax.Array, compute: layers.ComputeConfig) -> jax.Array:
    """Returns embeddings [B, S, D]: the tokens, then the patches row by row, with positions."""
    c, B = self.config, pixels_BYWM.shape[0]
    x_BSD = _patches.embed(c, pixels_BYWM, self.patch, compute)
    x_BSD = x_BSD + compute.cast_and_gather(self.patch_bias)[...][None, None]
    tokens = [compute.cast_and_gather(getattr(self, name))[...] for name in self.TOKENS]
    tokens = [jnp.broadcast_to(t, (B, 1, c.hidden_size)) for t in tokens]
    return jnp.concatenate([*tokens, x_BSD], 1) + compute.cast_and_gather(self.places)[...]


class Model(nnx.Module):
  """An image classifier. Its output has one position, the class token."""

  def __init__(self, c: Config, key: jax.Array):
    body, head = jax.random.split(key)
    self.config = c
    self.body = Body(c, PREFIX, body)
    declare = Declare(head, "")
    self.head, self.head_bias = classifier(declare, "classifier", c)

  def __call__(
    self, inputs: Images, compute: layers.ComputeConfig, taps: tuple[int, ...] = ()
  ) -> Output:
    """Returns the model's Output with T = 1; see types.Model."""
    x_BSD, taps_PBSD = self.body(inputs, compute, taps)
    weights = compute.cast_and_gather(self.head)[...], compute.cast_and_gather(self.head_bias)[...]
    hidden, head = layers.with_bias(x_BSD[:, :1], *weights)
    return Output(hidden, head, taps_PBTD=taps_PBSD)

  def qkv(self, layer: int, x_BSD: jax.Array, inputs: Images, compute: layers.ComputeConfig) -> QKV:
    """Returns the queries, keys and values of one layer, given the output of the layer before."""
    del inputs
    return compute.cast_and_gather(take_layer(self.body.layers, layer)).qkv(x_BSD)


def classifier(declare: Declare, name: str, c: Config) -> tuple[nnx.Param, nnx.Param]:
  """Declares a head with the Hugging Face name `name`; returns (weight, bias)."""
  dims = f"classes:{c.num_labels} embed:{c.hidden_size}"
  return declare.linear(name, dims, "classes", 0.02), declare.bias(name, c.num_labels)


TINY = Config(
  hidden_size=32,
  intermediate_size=64,
  num_hidden_layers=3,
  num_attention_heads=4,
  image_size=12,
  patch_size=4,
  num_channels=1,
  num_labels=10,
)

CONFIGS = {
  "tiny": TINY,
  "vit-base-16": Config(
    hidden_size=768,
    intermediate_size=3_072,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_labels=1_000,
  ),
}
