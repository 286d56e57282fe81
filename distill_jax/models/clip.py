"""CLIP (arXiv:2103.00020): embeddings of images and of their texts in one space."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.errors import bad_value
from distill_jax.models import _encoder, _vision_tower
from distill_jax.models._declare import Declare
from distill_jax.models._family import SizesOfPart, check_numbers
from distill_jax.nn import layers, sharding
from distill_jax.nn.params import param, stack
from distill_jax.types import IN_BATCH_CLASSES, QKV, Images, ImageText, Inputs, JsonObject, Output

HF_MODEL_TYPES = ("clip",)  # model_type in config.json
MAX_LOGIT_SCALE = math.log(100)  # above it, CLIP's authors found training unstable
EMPTY_LOGIT = -1e9  # logit of a padding row of the batch


@dataclasses.dataclass(frozen=True)
class TextConfig(_encoder.Config):
  """The text tower's architecture, with defaults for fields that may be missing in config.json."""

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
  eos_token_id: int = 49_407  # its output embeds the text; in old files 2 means the last id

  OPTIONAL_ZERO = ("pad_token_id", "bos_token_id")


@dataclasses.dataclass(frozen=True)
class Config(SizesOfPart):
  """A model's architecture. Its layers, e.g. for taps, are those of the vision tower."""

  text: TextConfig
  vision: _vision_tower.VisionConfig
  projection_dim: int = 512

  def __post_init__(self):
    check_numbers(self)

  @classmethod
  def from_hf(cls, hf: JsonObject) -> Self:
    """Returns the config for a Hugging Face config.json; text_config_dict replaces text_config."""
    parts = {n: hf.get(f"{n}_config_dict") or hf[f"{n}_config"] for n in ("text", "vision")}
    text = _encoder.config_of_part(TextConfig, parts["text"])
    vision = _encoder.config_of_part(_vision_tower.VisionConfig, parts["vision"])
    return cls(text, vision, *(hf[k] for k in ("projection_dim",) if k in hf))

  def to_hf(self) -> JsonObject:
    """Returns the config.json of this model."""
    common = {"attention_dropout": 0.0, "projection_dim": self.projection_dim}
    text = {"model_type": "clip_text_model", **dataclasses.asdict(self.text), **common}
    vision = {"model_type": "clip_vision_model", **dataclasses.asdict(self.vision), **common}
    return {
      "architectures": ["CLIPModel"],
      "model_type": "clip",
      "projection_dim": self.projection_dim,
      "text_config": text,
      "vision_config": vision,
    }

  def keep_layers(self, kept: tuple[int, ...]) -> Self:
    """Returns the config of a model with only these layers of both towers, in this order."""
    text, vision = self.text.num_hidden_layers, self.vision.num_hidden_layers
    if text != vision:
      expected = f"(), since the towers have different numbers of layers ({text} and {vision})"
      raise bad_value("keep_layers", kept, expected, "Choose a smaller shape for the student")
    return dataclasses.replace(
      self, text=self.text.keep_layers(kept), vision=self.vision.keep_layers(kept)
    )

  def ignores_tensor(self, name: str) -> bool:
    """Returns whether a checkpoint may hold this tensor although the model does not use it."""
    return name.endswith("embeddings.position_ids")

  @property
  def head_rows(self) -> int:
    return IN_BATCH_CLASSES

  @property
  def vocab_size(self) -> int:
    return self.text.vocab_size

  @property
  def max_position_embeddings(self) -> int:
    return self.text.max_position_embeddings

  @property
  def embedding_size(self) -> int:
    """Width of the embeddings of images and texts."""
    return self.projection_dim

  @property
  def layered_part(self) -> _vision_tower.VisionConfig:
    return self.vision


class CausalBlock(_vision_tower.Block):
  """One layer of the text tower."""

  CAUSAL = True


class TextTower(nnx.Module):
  """A causal encoder: texts to one embedding each."""

  def __init__(self, c: TextConfig, prefix: str, key: jax.Array):
    """Declares the parameters. Their Hugging Face names begin with `prefix`."""
    keys, D, V = jax.random.split(key, 4), c.hidden_size, c.vocab_size
    tokens, positions = (f"{prefix}embeddings.{n}_embedding.weight" for n in ("token", "position"))
    self.config = c
    self.embed = param(keys[0], f"vocab:{V} table:{D}", tokens, init=0.02)
    dims = f"places:{c.max_position_embeddings} table:{D}"
    self.places = param(keys[1], dims, positions, init=0.01)
    block = functools.partial(CausalBlock, c, prefix + "encoder.layers.{layers}.")
    self.layers = stack(c.num_hidden_layers, block, keys[2])
    self.top, self.top_bias = Declare(keys[3], prefix).layer_norm("final_layer_norm", D)

  def __call__(self, inputs: Inputs, compute: layers.ComputeConfig) -> jax.Array:
    """Returns the normed output at the last token of each text, [B, D]."""
    with jax.named_scope("embed"):
      x_BSD = compute.lookup(self.embed, inputs.tokens_BT)
      x_BSD = x_BSD + compute.lookup(self.places, inputs.positions_BT)
      x_BSD = sharding.constrain(x_BSD, "batch seq embed", compute.rules)
    valid_BS = inputs.segments_BT > 0
    x_BSD, _ = layers.scan_layers(
      [self.layers], lambda layer, i, x: layer(x, valid_BS), x_BSD, (), compute
    )
    last_B11 = jnp.maximum(jnp.sum(valid_BS, 1, dtype=jnp.int32) - 1, 0)[:, None, None]
    x_BD = jnp.take_along_axis(x_BSD, last_B11, 1)[:, 0]
    return layers.layer_norm(x_BD, self.top[...], self.top_bias[...], self.config.layer_norm_eps)


class Model(nnx.Module):
  """Two towers. The output has two positions for each pair, the image and the text.

  The rows of the head are the embeddings of all texts of the batch, followed by those of all
  images. Position 0, the image, predicts a text, and position 1 an image
  (Batch.with_contrastive_labels). Cross-entropy is then InfoNCE in both directions, as in CLIP.
  """

  def __init__(self, c: Config, key: jax.Array):
    keys = jax.random.split(key, 4)
    self.config = c
    self.text = TextTower(c.text, "text_model.", keys[0])
    self.vision = _vision_tower.VisionTower(c.vision, "vision_model.", keys[1])
    # The outputs are sharded over the logical axis "heads", like queries.
    text, image = (
      f"embed:{part.hidden_size} heads:{c.projection_dim}" for part in (c.text, c.vision)
    )
    self.of_text = Declare(keys[2], "").linear("text_projection", text, "heads")
    self.of_image = Declare(keys[3], "").linear("visual_projection", image, "heads")
    scale = param(key, "", "logit_scale", init="zeros", exact=True)
    self.scale = scale.replace(scale[...] + math.log(1 / 0.07))

  def __call__(
    self, inputs: ImageText, compute: layers.ComputeConfig, taps: tuple[int, ...] = ()
  ) -> Output:
    """Returns a contrastive Output with T = 2; `taps` are layers of the vision tower."""
    image_BO, taps_PBSD = self.embed_images(inputs.images, compute, taps)
    text_BO = self.embed_texts(inputs.texts, compute)
    scale = jnp.exp(jnp.minimum(self.scale[...].astype(jnp.float32), MAX_LOGIT_SCALE))
    both_B2O = jnp.stack([image_BO, text_BO], 1)
    # Padding rows of the batch, whose text is empty, are not used as negatives.
    empty_B = jnp.all(inputs.texts.segments_BT == 0, 1)
    bias_V = jnp.tile(jnp.where(empty_B, EMPTY_LOGIT, 0.0), 2)
    head_VO = jnp.concatenate([text_BO, image_BO])
    hidden, head = layers.with_bias(scale * both_B2O, head_VO, bias_V)
    return Output(hidden, head, taps_PBTD=taps_PBSD, embedding_BTD=both_B2O, contrastive=True)

  def embed_images(
    self, inputs: Images, compute: layers.ComputeConfig, taps: tuple[int, ...] = ()
  ) -> tuple[jax.Array, jax.Array | None]:
    """Returns (embeddings of length 1, float32 [B, O]; taps)."""
    x_BSD, taps_PBSD = self.vision(inputs, compute, taps)
    return layers.unit(
      self.vision.pool(x_BSD) @ compute.cast_and_gather(self.of_image)[...]
    ), taps_PBSD

  def embed_texts(self, inputs: Inputs, compute: layers.ComputeConfig) -> jax.Array:
    """Returns embeddings of length 1, float32 [B, O]."""
    return layers.unit(self.text(inputs, compute) @ compute.cast_and_gather(self.of_text)[...])

  def qkv(
    self, layer: int, x_BSD: jax.Array, inputs: ImageText, compute: layers.ComputeConfig
  ) -> QKV:
    """Returns the queries, keys and values of a layer of the vision tower, given its input."""
    return self.vision.qkv(layer, x_BSD, compute)


TINY = Config(
  TextConfig(
    32, 64, 2, 4, vocab_size=256, max_position_embeddings=32, bos_token_id=254, eos_token_id=255
  ),
  _vision_tower.VisionConfig(48, 64, 3, 4, num_channels=1, image_size=8, patch_size=4),
  projection_dim=24,
)

CONFIGS = {
  "tiny": TINY,
  "vit-b-32": Config(TextConfig(), _vision_tower.VisionConfig()),
  "vit-b-16": Config(TextConfig(), _vision_tower.VisionConfig(patch_size=16)),
  "vit-l-14": Config(
    TextConfig(768, 3_072, 12, 12),
    _vision_tower.VisionConfig(1_024, 4_096, 24, 16, patch_size=14),
    projection_dim=768,
  ),
}
