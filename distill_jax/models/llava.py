"""LLaVA (arXiv:2304.08485, arXiv:2310.03744): a decoder that reads patches as tokens."""

from __future__ import annotations

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.errors import InputError
from distill_jax.models import _encoder, _vision_tower, llama
from distill_jax.models._declare import Declare
from distill_jax.models._family import SizesOfPart, check_supported
from distill_jax.nn import layers, params
from distill_jax.types import QKV, Images, ImageText, JsonObject, Output

HF_MODEL_TYPES = ("llava",)  # of config.json
AFTER, PREFIX = "vision_tower.", "vision_model."  # what transformers 5 leaves out, after what
SUPPORTED_VALUES = {
  "projector_hidden_act": "gelu",
  "multimodal_projector_bias": True,
  "vision_feature_select_strategy": "default",
}


@dataclasses.dataclass(frozen=True)
class Config(SizesOfPart):
  """The shape of a model. Layers, as losses of features count them, are the decoder's.

  Attributes:
    feature_layer: of the vision tower, whose patches are read; negative ones count from behind,
      -1 the last layer's output, as in Hugging Face's vision_feature_layer.
    image_token: stands in a text, once a patch, where the picture is.
  """

  text: llama.Config
  vision: _vision_tower.VisionConfig
  image_token: int
  feature_layer: int = -2

  def __post_init__(self):
    n = self.vision.num_hidden_layers
    if not -n - 1 <= self.feature_layer <= n:
      raise InputError(
        f"vision_feature_layer is {self.feature_layer} and the vision tower has {n} layers"
      )
    if not 0 <= self.image_token < self.text.vocab_size:
      raise InputError(
        f"image_token_index is {self.image_token} and the decoder has {self.text.vocab_size} tokens"
      )

  @classmethod
  def from_hf(cls, hf: JsonObject) -> Self:
    """From a Hugging Face config.json; what this family cannot do is refused by name."""
    check_supported(hf, SUPPORTED_VALUES, "llava")
    text, vision = hf["text_config"], hf["vision_config"]
    kinds = text.get("model_type", "llama"), vision.get("model_type", "clip_vision_model")
    if kinds[0] not in llama.HF_MODEL_TYPES or kinds[1] != "clip_vision_model":
      raise InputError(f"config.json joins {kinds[1]} to {kinds[0]}; llava here is CLIP and Llama")
    layer = hf.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
      raise InputError(f"config.json has vision_feature_layer={layer!r}; here it is one layer")
    token = hf["image_token_id"] if "image_token_id" in hf else hf["image_token_index"]
    tower = _encoder.config_of_part(_vision_tower.VisionConfig, vision)
    return cls(llama.Config.from_hf(text), tower, token, layer)

  def to_hf(self) -> JsonObject:
    """The config.json of this model."""
    vision = {"model_type": "clip_vision_model", **dataclasses.asdict(self.vision)}
    return {
      "architectures": ["LlavaForConditionalGeneration"],
      "model_type": "llava",
      **SUPPORTED_VALUES,
      "image_token_index": self.image_token,
      "image_seq_length": self.vision.num_patches,
      "vision_feature_layer": self.feature_layer,
      "text_config": self.text.to_hf(),
      "vision_config": vision,
      "tie_word_embeddings": self.text.tie_word_embeddings,
    }

  def keep_layers(self, kept: tuple[int, ...]) -> Self:
    """The config of a model that has these layers of the decoder of this one, in this order."""
    raise InputError(
      f"keep_layers {kept} would take layers out of both parts of a llava; name a shape of its own"
    )

  def ignores_tensor(self, name: str) -> bool:
    """Whether a checkpoint may hold this tensor although the model has no use for it."""
    return name.endswith("embeddings.position_ids") or self.text.ignores_tensor(name)

  @property
  def head_rows(self) -> int:
    return self.text.vocab_size

  @property
  def vocab_size(self) -> int:
    return self.text.vocab_size

  @property
  def tie_word_embeddings(self) -> bool:
    return self.text.tie_word_embeddings

  @property
  def tied_table(self) -> str | None:
    return self.text.tied_table

  @property
  def max_position_embeddings(self) -> int:
    return self.text.max_position_embeddings

  @property
  def layered_part(self) -> llama.Config:
    return self.text


class Model(nnx.Module):
  """Texts with an image each; hidden states of every token, the image's among them."""

  def __init__(self, c: Config, key: jax.Array):
    keys, D = jax.random.split(key, 3), c.text.hidden_size
    self.config = c
    self.text = params.map_params(_name_in_language_model, llama.Model(c.text, keys[0]))
    self.vision = _vision_tower.VisionTower(c.vision, "vision_tower.vision_model.", keys[1])
    declare = Declare(keys[2], "multi_modal_projector.")
    # "heads" names the axis that a projection's outputs are spread over, as queries are.
    self.first = declare.linear("linear_1", f"embed:{c.vision.hidden_size} heads:{D}", "heads")
    self.first_bias = declare.bias("linear_1", D)
    self.second = declare.linear("linear_2", f"mlp:{D} embed:{D}", "embed")
    self.second_bias = declare.bias("linear_2", D)

  def __call__(
    self, inputs: ImageText, compute: layers.ComputeConfig, taps: tuple[int, ...] = ()
  ) -> Output:
    """Args: inputs, texts that have the image token once a patch; taps, layers of the decoder."""
    x_BTD, embed_VD = self.text.embed_tokens(inputs.texts.tokens_BT, compute)
    with jax.named_scope("image"):
      x_BTD = self.insert_patches(x_BTD, inputs, compute)
    return self.text.from_embeddings(x_BTD, embed_VD, inputs.texts, compute, taps)

  def insert_patches(
    self, x_BTD: jax.Array, inputs: ImageText, compute: layers.ComputeConfig
  ) -> jax.Array:
    """Embeddings with the image's patches where the image token stands, in order."""
    patches_BSD = self.project_patches(inputs.images, compute)
    is_image_BT = inputs.texts.tokens_BT == self.config.image_token
    patch_BT = jnp.cumsum(is_image_BT, 1) - 1
    patch_BT = jnp.clip(patch_BT, 0, patches_BSD.shape[1] - 1)
    image_BTD = jnp.take_along_axis(patches_BSD, patch_BT[..., None], 1)
    return jnp.where(is_image_BT[..., None], image_BTD.astype(x_BTD.dtype), x_BTD)

  def project_patches(self, inputs: Images, compute: layers.ComputeConfig) -> jax.Array:
    """The decoder's inputs for an image: [B, patches, D]."""
    c = self.config
    layer = c.feature_layer % (c.vision.num_hidden_layers + 1)  # 0 is what the first layer reads
    x_BSD = self.vision.first_layers(layer, inputs, compute)[:, 1:]
    first, first_bias, second, second_bias = compute.cast_and_gather(
      (self.first, self.first_bias, self.second, self.second_bias)
    )
    h_BSD = x_BSD @ first[...] + first_bias[...][None, None]
    h_BSD = _encoder.ACTIVATIONS["gelu"](h_BSD)
    return h_BSD @ second[...] + second_bias[...][None, None]

  def qkv(
    self, layer: int, x_BTD: jax.Array, inputs: ImageText, compute: layers.ComputeConfig
  ) -> QKV:
    """Of one layer of the decoder, from the output of the layer before it."""
    return self.text.qkv(layer, x_BTD, inputs.texts, compute)


def _name_in_language_model(v: nnx.Variable) -> nnx.Variable:
  """The decoder's parameter under the name that it has within a LLaVA."""
  return v.replace(hf="language_model." + v.get_metadata()["hf"])


TINY = Config(
  llama.TINY,
  _vision_tower.VisionConfig(48, 64, 3, 4, num_channels=1, image_size=8, patch_size=4),
  image_token=255,
)

CONFIGS = {
  "tiny": TINY,
  "llava-1.5-7b": Config(
    llama.Config(
      vocab_size=32_064,
      hidden_size=4_096,
      intermediate_size=11_008,
      num_hidden_layers=32,
      num_attention_heads=32,
      num_key_value_heads=32,
      head_dim=128,
      max_position_embeddings=4_096,
    ),
    _vision_tower.VisionConfig(1_024, 4_096, 24, 16, image_size=336, patch_size=14),
    image_token=32_000,
  ),
}
