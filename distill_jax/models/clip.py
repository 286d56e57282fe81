"""CLIP (arXiv:2103.00020): pictures and the words that belong to them, as vectors of one space."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.errors import InputError
from distill_jax.models import _encoder, _patches, _rope
from distill_jax.nn import layers, sharding
from distill_jax.nn.params import param, stack, unstack
from distill_jax.types import IN_BATCH_CLASSES, Images, ImageText, Inputs, Output

HF_MODEL_TYPES = ("clip",)  # of config.json
MOST = math.log(100)  # of logit_scale, past which CLIP's authors found training unstable
NOTHING = -1e9  # the logit of a row of the batch that holds no pair


@dataclasses.dataclass(frozen=True)
class Text(_encoder.Config):
  """The shape of the text tower, with the values that config.json may leave out."""

  hidden_size: int = 512
  intermediate_size: int = 2_048
  num_hidden_layers: int = 12
  num_attention_heads: int = 8
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5
  vocab_size: int = 49_408
  max_position_embeddings: int = 77
  pad_token_id: int = 1
  bos_token_id: int = 49_406
  eos_token_id: int = 49_407  # a text is what its end says; 2, in old files, is the last id

  OPTIONAL_ZERO = ("pad_token_id", "bos_token_id")


@dataclasses.dataclass(frozen=True)
class Vision(_encoder.Config):
  """The shape of the vision tower, with the values that config.json may leave out."""

  hidden_size: int = 768
  intermediate_size: int = 3_072
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5
  num_channels: int = 3
  image_size: int = 224
  patch_size: int = 32

  def __post_init__(self):
    super().__post_init__()
    _patches.check(self)

  @property
  def patches(self) -> int:
    return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class Config:
  """The shape of a model. Layers, as losses of features count them, are the vision tower's."""

  text: Text
  vision: Vision
  projection_dim: int = 512

  def __post_init__(self):
    _rope.check_numbers(self)

  @classmethod
  def from_hf(cls, hf: dict[str, Any]) -> Self:
    """From a Hugging Face config.json, whose text_config_dict, if there, is the newer one."""
    of = lambda name: hf.get(f"{name}_config_dict") or hf[f"{name}_config"]
    text, vision = tower(Text, of("text")), tower(Vision, of("vision"))
    return cls(text, vision, *(hf[k] for k in ("projection_dim",) if k in hf))

  def to_hf(self) -> dict[str, Any]:
    """The config.json of this model."""
    said = {"attention_dropout": 0.0, "projection_dim": self.projection_dim}
    text = {"model_type": "clip_text_model", **dataclasses.asdict(self.text), **said}
    vision = {"model_type": "clip_vision_model", **dataclasses.asdict(self.vision), **said}
    return {
      "architectures": ["CLIPModel"],
      "model_type": "clip",
      "projection_dim": self.projection_dim,
      "text_config": text,
      "vision_config": vision,
    }

  def keep_layers(self, kept: tuple[int, ...]) -> Any:
    """The config of a model that has these layers of both towers of this one, in this order."""
    text, vision = self.text.num_hidden_layers, self.vision.num_hidden_layers
    if text != vision:
      raise InputError(
        f"keep_layers chooses layers of both towers, and this model's have {text} (text) and "
        f"{vision} (vision); name a shape of its own for the student"
      )
    return dataclasses.replace(
      self, text=self.text.keep_layers(kept), vision=self.vision.keep_layers(kept)
    )

  def ignores_tensor(self, name: str) -> bool:
    """Whether a checkpoint may hold this tensor although the model has no use for it."""
    return name.endswith("embeddings.position_ids")

  # What the rest asks of every family.
  head_rows = IN_BATCH_CLASSES
  vocab_size = property(lambda self: self.text.vocab_size)
  max_position_embeddings = property(lambda self: self.text.max_position_embeddings)
  num_hidden_layers = property(lambda self: self.vision.num_hidden_layers)
  hidden_size = property(lambda self: self.vision.hidden_size)
  num_attention_heads = property(lambda self: self.vision.num_attention_heads)
  num_key_value_heads = property(lambda self: self.vision.num_key_value_heads)
  head_dim = property(lambda self: self.vision.head_dim)
  embedding_size = property(lambda self: self.projection_dim)


def tower(cls: Any, hf: dict[str, Any]) -> Any:
  """A tower's Config from its part of config.json."""
  return cls(**{f.name: hf[f.name] for f in dataclasses.fields(cls) if f.name in hf})


class Block(_encoder.Block):
  """One layer of the vision tower, normed before attention and before the feed-forward."""

  NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.out_proj",
    "attn_norm": "layer_norm1",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
    "mlp_norm": "layer_norm2",
  }


class CausalBlock(Block):
  """One layer of the text tower."""

  CAUSAL = True


class VisionTower(nnx.Module):
  """Pictures to a vector a patch, after one that stands for the whole; `at` is its HF name."""

  def __init__(self, c: Vision, at: str, key: jax.Array):
    keys, D, p = jax.random.split(key, 6), c.hidden_size, c.patch_size
    self.config = c
    self.whole = param(keys[0], f"table:{D}", f"{at}embeddings.class_embedding", init=D**-0.5)
    # In torch's order, as a convolution's weights have four axes there.
    dims = f"embed:{D} channels:{c.num_channels} pixels:{p} pixels:{p}"
    std = (c.num_channels * p * p) ** -0.5
    self.patch = param(keys[1], dims, f"{at}embeddings.patch_embedding.weight", init=std)
    self.places = param(
      keys[2],
      f"places:{c.patches + 1} table:{D}",
      f"{at}embeddings.position_embedding.weight",
      init=0.02,
    )
    # Misspelt by those who wrote the checkpoints.
    self.norm, self.norm_bias = _encoder.Declare(keys[3], at).norm("pre_layrnorm", D)
    block = functools.partial(Block, c, at + "encoder.layers.{layers}.")
    self.layers = stack(c.num_hidden_layers, block, keys[4])
    self.top, self.top_bias = _encoder.Declare(keys[5], at).norm("post_layernorm", D)

  def __call__(
    self, inputs: Images, compute: layers.ComputeConfig, taps: tuple[int, ...] = ()
  ) -> tuple[jax.Array, jax.Array | None]:
    """The last layer's output [B, 1 + patches, D], and the taps."""
    return self._through(self.layers, inputs, compute, taps)

  def first_layers(self, n: int, inputs: Images, compute: layers.ComputeConfig) -> jax.Array:
    """The output of the first n layers, [B, 1 + patches, D]."""
    return self._through(jax.tree.map(lambda w: w[:n], self.layers), inputs, compute, ())[0]

  def _through(
    self, stacked: Any, inputs: Images, compute: layers.ComputeConfig, taps: tuple[int, ...]
  ):
    with jax.named_scope("embed"):
      x_BSD, eps = self.embed_patches(inputs.pixels_BWWM, compute), self.config.layer_norm_eps
      x_BSD = layers.layer_norm(x_BSD, self.norm[...], self.norm_bias[...], eps)
      x_BSD = sharding.constrain(x_BSD, "batch seq embed", compute.rules)
    return layers.scan_layers([stacked], lambda layer, i, x: layer(x, None), x_BSD, taps, compute)

  def embed_patches(self, pixels_BWWM: jax.Array, compute: layers.ComputeConfig) -> jax.Array:
    """[B, 1 + patches, D]: what stands for the whole, then the patches row by row."""
    c, B = self.config, pixels_BWWM.shape[0]
    patches_BSD = _patches.embed(c, pixels_BWWM, self.patch, compute)
    whole_B1D = jnp.broadcast_to(compute.cast_and_gather(self.whole)[...], (B, 1, c.hidden_size))
    x_BSD = jnp.concatenate([whole_B1D, patches_BSD], 1)
    return x_BSD + compute.cast_and_gather(self.places)[...][None]

  def pool(self, x_BSD: jax.Array) -> jax.Array:
    """[B, D], what stands for the whole picture."""
    return layers.layer_norm(
      x_BSD[:, 0], self.top[...], self.top_bias[...], self.config.layer_norm_eps
    )

  def qkv(self, layer: int, x_BSD: jax.Array, compute: layers.ComputeConfig):
    """Queries, keys and values of one layer, from the output of the layer before it."""
    here = jax.tree.map(lambda w: w[layer], self.layers)
    return compute.cast_and_gather(unstack(here)).qkv(x_BSD)


class TextTower(nnx.Module):
  """Texts to vectors, read from left to right; `at` is its Hugging Face name."""

  def __init__(self, c: Text, at: str, key: jax.Array):
    keys, D = jax.random.split(key, 4), c.hidden_size
    table = lambda k, dims, name, std: param(
      k, f"{dims} table:{D}", f"{at}embeddings.{name}_embedding.weight", init=std
    )
    self.config = c
    self.embed = table(keys[0], f"vocab:{c.vocab_size}", "token", 0.02)
    self.places = table(keys[1], f"places:{c.max_position_embeddings}", "position", 0.01)
    block = functools.partial(CausalBlock, c, at + "encoder.layers.{layers}.")
    self.layers = stack(c.num_hidden_layers, block, keys[2])
    self.top, self.top_bias = _encoder.Declare(keys[3], at).norm("final_layer_norm", D)

  def __call__(self, inputs: Inputs, compute: layers.ComputeConfig) -> jax.Array:
    """[B, D], what stands at the end of each text."""
    with jax.named_scope("embed"):
      x_BSD = compute.cast_and_gather(self.embed)[...][inputs.tokens_BT]
      x_BSD = x_BSD + compute.cast_and_gather(self.places)[...][inputs.positions_BT]
      x_BSD = sharding.constrain(x_BSD, "batch seq embed", compute.rules)
    valid_BS = inputs.segments_BT > 0
    run = lambda layer, i, x: layer(x, valid_BS)
    x_BSD, _ = layers.scan_layers([self.layers], run, x_BSD, (), compute)
    last_B11 = jnp.maximum(jnp.sum(valid_BS, 1, dtype=jnp.int32) - 1, 0)[:, None, None]
    x_BD = jnp.take_along_axis(x_BSD, last_B11, 1)[:, 0]
    return layers.layer_norm(x_BD, self.top[...], self.top_bias[...], self.config.layer_norm_eps)


class Model(nnx.Module):
  """Pairs in; two positions a pair out, its picture and its text, and all of the batch as head.

  The head's rows are the vectors of all texts of the batch, then of all pictures: position 0
  chooses among the first, position 1 among the second (Batch.with_contrastive_labels).
  Cross-entropy is then InfoNCE in both directions, as CLIP is trained.
  """

  def __init__(self, c: Config, key: jax.Array):
    keys, E = jax.random.split(key, 4), c.projection_dim
    self.config = c
    self.text = TextTower(c.text, "text_model.", keys[0])
    self.vision = VisionTower(c.vision, "vision_model.", keys[1])
    # "heads" names the axis that a projection's outputs are spread over, as queries are.
    linear = lambda k, name, D: _encoder.Declare(k, "").linear(
      name, f"embed:{D} heads:{E}", "heads"
    )
    self.of_text = linear(keys[2], "text_projection", c.text.hidden_size)
    self.of_image = linear(keys[3], "visual_projection", c.vision.hidden_size)
    scale = param(key, "", "logit_scale", init="zeros", exact=True)
    self.scale = scale.replace(scale[...] + math.log(1 / 0.07))

  def __call__(
    self, inputs: ImageText, compute: layers.ComputeConfig, taps: tuple[int, ...] = ()
  ) -> Output:
    """Args: taps, layers of the vision tower. Returns: Output, T = 2, its head `contrastive`."""
    image_BE, taps_PBSD = self.embed_images(inputs.images, compute, taps)
    text_BE = self.embed_texts(inputs.texts, compute)
    scale = jnp.exp(jnp.minimum(self.scale[...].astype(jnp.float32), MOST))
    both_B2E = jnp.stack([image_BE, text_BE], 1)
    # A row of the batch that is filled up, whose text is empty, is nobody's negative.
    empty_B = jnp.all(inputs.texts.segments_BT == 0, 1)
    bias_V = jnp.tile(jnp.where(empty_B, NOTHING, 0.0), 2)
    head_VE = jnp.concatenate([text_BE, image_BE])
    hidden, head = layers.with_bias(scale * both_B2E, head_VE, bias_V)
    return Output(hidden, head, taps_PBTD=taps_PBSD, embedding_BTD=both_B2E, contrastive=True)

  def embed_images(
    self, inputs: Images, compute: layers.ComputeConfig, taps: tuple[int, ...] = ()
  ) -> tuple[jax.Array, jax.Array | None]:
    """(vectors of length 1, float32 [B, E]; the taps)"""
    x_BSD, taps_PBSD = self.vision(inputs, compute, taps)
    return layers.unit(
      self.vision.pool(x_BSD) @ compute.cast_and_gather(self.of_image)[...]
    ), taps_PBSD

  def embed_texts(self, inputs: Inputs, compute: layers.ComputeConfig) -> jax.Array:
    """Vectors of length 1, float32 [B, E]."""
    return layers.unit(self.text(inputs, compute) @ compute.cast_and_gather(self.of_text)[...])

  def qkv(self, layer: int, x_BSD: jax.Array, inputs: ImageText, compute: layers.ComputeConfig):
    """Of one layer of the vision tower, from the output of the layer before it."""
    return self.vision.qkv(layer, x_BSD, compute)


TINY = Config(
  Text(
    32, 64, 2, 4, vocab_size=256, max_position_embeddings=32, bos_token_id=254, eos_token_id=255
  ),
  Vision(48, 64, 3, 4, num_channels=1, image_size=8, patch_size=4),
  projection_dim=24,
)

CONFIGS = {
  "tiny": TINY,
  "vit-b-32": Config(Text(), Vision()),
  "vit-b-16": Config(Text(), Vision(patch_size=16)),
  "vit-l-14": Config(
    Text(768, 3_072, 12, 12), Vision(1_024, 4_096, 24, 16, patch_size=14), projection_dim=768
  ),
}
