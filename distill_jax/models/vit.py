"""ViT (arXiv:2010.11929): images, cut into patches, to classes."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.errors import InputError
from distill_jax.models import _encoder, _patches
from distill_jax.models._declare import Declare
from distill_jax.nn import layers, sharding
from distill_jax.nn.params import param, stack, take_layer
from distill_jax.types import QKV, Images, JsonObject, Output

HF_MODEL_TYPES = ("vit",)  # of config.json
PREFIX = "vit."  # of all but the head; a checkpoint of the body alone goes without


@dataclasses.dataclass(frozen=True)
class Config(_encoder.VisionConfig):
  """The shape of a model, in Hugging Face's words. There is no dropout."""

  num_labels: int = 2

  MODEL_TYPE: ClassVar[str] = "vit"
  ARCHITECTURE: ClassVar[str] = "ViTForImageClassification"
  TOKENS: ClassVar[int] = 1  # before the patches

  @classmethod
  def from_hf(cls, hf: JsonObject) -> Self:
    """From a Hugging Face config.json; what this family cannot do is refused by name."""
    if not hf.get("qkv_bias", True):
      raise InputError(f"config.json has qkv_bias=False; the {cls.MODEL_TYPE} family has it")
    names = {f.name for f in dataclasses.fields(cls)} - {"num_labels"}
    return cls(**{n: hf[n] for n in names if n in hf}, num_labels=_encoder.num_labels_of(hf))

  def to_hf(self) -> JsonObject:
    """The config.json of this model."""
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
    """Whether a checkpoint may hold this tensor although the model has no use for it."""
    return ".pooler." in f".{name}" or name.endswith("embeddings.mask_token")

  @property
  def head_rows(self) -> int:
    return self.num_labels

  @property
  def positions(self) -> int:
    """Positions of the layers' input: the tokens before the patches, and the patches."""
    return self.TOKENS + self.num_patches


class Block(_encoder.Block):
  """One layer, normed before attention and before the feed-forward."""

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
  """An image in, the layers' output at each of its patches and before them out."""

  TOKENS: ClassVar[tuple[str, ...]] = ("cls_token",)  # before the patches

  def __init__(self, c: Config, prefix: str, key: jax.Array):
    keys, at = iter(jax.random.split(key, 4 + len(self.TOKENS))), f"{prefix}embeddings."
    D, M, p = c.hidden_size, c.num_channels, c.patch_size
    self.config = c
    for name in self.TOKENS:
      setattr(self, name, param(next(keys), f"one:1 one:1 table:{D}", at + name, init=0.02))
    dims = f"one:1 places:{c.positions} table:{D}"
    self.places = param(next(keys), dims, f"{at}position_embeddings", init=0.02)
    patch = Declare(next(keys), at + "patch_embeddings.")
    # In torch's order, as a convolution's weights have four axes there.
    dims = f"embed:{D} channels:{M} pixels:{p} pixels:{p}"
    self.patch = patch.linear("projection", dims, "", init=(M * p * p) ** -0.5)
    self.patch_bias = patch.bias("projection", D)
    block = functools.partial(Block, c, prefix + "encoder.layer.{layers}.")
    self.layers = stack(c.num_hidden_layers, block, next(keys))
    self.norm, self.norm_bias = Declare(next(keys), prefix).layer_norm("layernorm", D)

  def __call__(
    self, inputs: Images, compute: layers.ComputeConfig, taps: tuple[int, ...] = ()
  ) -> tuple[jax.Array, jax.Array | None]:
    """The last layer's output [B, S, D], normed, and the taps."""
    with jax.named_scope("embed"):
      x_BSD = self.embed_patches(inputs.pixels_BYWM, compute)
      x_BSD = sharding.constrain(x_BSD, "batch seq embed", compute.rules)
    x_BSD, taps_PBSD = layers.scan_layers(
      [self.layers], lambda layer, i, x: layer(x, None), x_BSD, taps, compute
    )
    eps = self.config.layer_norm_eps
    return layers.layer_norm(x_BSD, self.norm[...], self.norm_bias[...], eps), taps_PBSD

  def embed_patches(self, pixels_BYWM: jax.Array, compute: layers.ComputeConfig) -> jax.Array:
    """[B, S, D]: the tokens, then the patches row by row, each with its place."""
    c, B = self.config, pixels_BYWM.shape[0]
    x_BSD = _patches.embed(c, pixels_BYWM, self.patch, compute)
    x_BSD = x_BSD + compute.cast_and_gather(self.patch_bias)[...][None, None]
    tokens = [compute.cast_and_gather(getattr(self, name))[...] for name in self.TOKENS]
    tokens = [jnp.broadcast_to(t, (B, 1, c.hidden_size)) for t in tokens]
    return jnp.concatenate([*tokens, x_BSD], 1) + compute.cast_and_gather(self.places)[...]


class Model(nnx.Module):
  """Images in; the class token and the classifier out, as one position."""

  def __init__(self, c: Config, key: jax.Array):
    body, head = jax.random.split(key)
    self.config = c
    self.body = Body(c, PREFIX, body)
    declare = Declare(head, "")
    self.head, self.head_bias = classifier(declare, "classifier", c)

  def __call__(
    self, inputs: Images, compute: layers.ComputeConfig, taps: tuple[int, ...] = ()
  ) -> Output:
    """Args: inputs, float32 pixels; taps, the layers whose output is kept. Returns: T = 1."""
    x_BSD, taps_PBSD = self.body(inputs, compute, taps)
    weights = compute.cast_and_gather(self.head)[...], compute.cast_and_gather(self.head_bias)[...]
    hidden, head = layers.with_bias(x_BSD[:, :1], *weights)
    return Output(hidden, head, taps_PBTD=taps_PBSD)

  def qkv(self, layer: int, x_BSD: jax.Array, inputs: Images, compute: layers.ComputeConfig) -> QKV:
    """Queries, keys and values of one layer, from the output of the layer before it."""
    del inputs
    return compute.cast_and_gather(take_layer(self.body.layers, layer)).qkv(x_BSD)


def classifier(declare: Declare, name: str, c: Config) -> tuple[nnx.Param, nnx.Param]:
  """(rows of classes, their biases) of a head that Hugging Face calls `name`."""
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
