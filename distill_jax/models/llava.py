"""LLaVA (arXiv:2304.08485, arXiv:2310.03744): a decoder with image patches among its tokens."""

from __future__ import annotations

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.errors import InputError, bad_value
from distill_jax.models import _encoder, _vision_tower, llama
from distill_jax.models._declare import Declare
from distill_jax.models._family import SizesOfPart, check_supported
from distill_jax.nn import layers, params
from distill_jax.types import QKV, Images, ImageText, JsonObject, Output

HF_MODEL_TYPES = ("llava",)  # model_type in config.json
AFTER, PREFIX = "vision_tower.", "vision_model."  # transformers 5 omits PREFIX after AFTER
SUPPORTED_VALUES = {
  "projector_hidden_act": "gelu",
  "multimodal_projector_bias": True,
  "vision_feature_select_strategy": "default",
}
TEXT_DEFAULTS: JsonObject = {  # of LlamaConfig, for keys that text_config may lack
  "vocab_size": 32_000,
  "hidden_size": 4_096,
  "intermediate_size": 11_008,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "max_position_embeddings": 2_048,
  "rms_norm_eps": 1e-6,
}


@dataclasses.dataclass(frozen=True)
class Config(SizesOfPart):
  """A model's architecture. Its layers, e.g. for taps, are those of the decoder.

  Attributes:
    text: the decoder.
    vision: the vision tower.
    image_token: the token that stands for the image in a text, repeated once for each patch.
    feature_layer: the layer of the vision tower whose output the decoder uses, called
      vision_feature_layer in config.json. Negative numbers count from the end: -1 is the last
      layer's output.
  """

  text: llama.Config
  vision: _vision_tower.VisionConfig
  image_token: int
  feature_layer: int = -2

  def __post_init__(self):
    n = self.vision.num_hidden_layers
    if not -n - 1 <= self.feature_layer <= n:
      expected = f"a layer of the vision tower, from {-n - 1} to {n}"
      action = "Correct the model's config"
      raise bad_value("vision_feature_layer", self.feature_layer, expected, action)
    if not 0 <= self.image_token < self.text.vocab_size:
      expected = f"a token below {self.text.vocab_size}"
      action = "Correct the model's config"
      raise bad_value("image_token_index", self.image_token, expected, action)

  @classmethod
  def from_hf(cls, hf: JsonObject) -> Self:
    """Returns the config for a Hugging Face config.json; unsupported values raise InputError."""
    check_supported(hf, SUPPORTED_VALUES, "llava")
    text, vision = hf["text_config"], hf["vision_config"]
    kinds = text.get("model_type", "llama"), vision.get("model_type", "clip_vision_model")
    if kinds[0] not in llama.HF_MODEL_TYPES or kinds[1] != "clip_vision_model":
      raise InputError(
        f"config.json combines {kinds[1]} with {kinds[0]}; the llava family has only CLIP with "
        "Llama or Mistral. Use another model."
      )
    layer = hf.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
      key = "vision_feature_layer in config.json"
      raise bad_value(key, layer, "the number of one layer", "Use another model")
    token = hf["image_token_id"] if "image_token_id" in hf else hf["image_token_index"]
    tower = _encoder.config_of_part(_vision_tower.VisionConfig, vision)
    if kinds[0] == "llama":
      text = TEXT_DEFAULTS | text
    return cls(llama.Config.from_hf(text), tower, token, layer)

  def to_hf(self) -> JsonObject:
    """Returns the config.json of this model."""
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
    """Raises InputError: the layers of a LLaVA cannot be selected."""
    expected = "(), since it would select layers of both parts of a llava"
    raise bad_value("keep_layers", kept, expected, "Choose a smaller shape")

  def ignores_tensor(self, name: str) -> bool:
    """Returns whether a checkpoint may hold this tensor although the model does not use it."""
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
  """A decoder of texts with one image each. Its output has all tokens, image tokens included."""

  def __init__(self, c: Config, key: jax.Array):
    keys, D = jax.random.split(key, 3), c.text.hidden_size
    self.config = c
    self.text = params.map_params(_name_in_language_model, llama.Model(c.text, keys[0]))
    self.vision = _vision_tower.VisionTower(c.vision, "vision_tower.vision_model.", keys[1])
    declare = Declare(keys[2], "multi_modal_projector.")
    # The outputs are sharded over the logical axis "heads", like queries.
    self.first = declare.linear("linear_1", f"embed:{c.vision.hidden_size} heads:{D}", "heads")
    self.first_bias = declare.bias("linear_1", D)
    self.second = declare.linear("linear_2", f"mlp:{D} embed:{D}", "embed")
    self.second_bias = declare.bias("linear_2", D)

  def __call__(
    self, inputs: ImageText, compute: layers.ComputeConfig, taps: tuple[int, ...] = ()
  ) -> Output:
    """Returns the model's Output; see types.Model.

    Args:
      inputs: images, and texts that contain the image token once for each patch.
      compute: the settings of the computation.
      taps: layers of the decoder whose outputs are also returned.
    """
    x_BTD, embed_VD = self.text.embed_tokens(inputs.texts.tokens_BT, compute)
    with jax.named_scope("image"):
      x_BTD = self.insert_patches(x_BTD, inputs, compute)
    return self.text.from_embeddings(x_BTD, embed_VD, inputs.texts, compute, taps)

  def insert_patches(
    self, x_BTD: jax.Array, inputs: ImageText, compute: layers.ComputeConfig
  ) -> jax.Array:
    """Replaces the embeddings of image tokens by the image's patches, in order."""
    patches_BSD = self.project_patches(inputs.images, compute)
    is_image_BT = inputs.texts.tokens_BT == self.config.image_token
    patch_BT = jnp.cumsum(is_image_BT, 1) - 1
    patch_BT = jnp.clip(patch_BT, 0, patches_BSD.shape[1] - 1)
    image_BTD = jnp.take_along_axis(patches_BSD, patch_BT[..., None], 1)
    return jnp.where(is_image_BT[..., None], image_BTD.astype(x_BTD.dtype), x_BTD)

  def project_patches(self, inputs: Images, compute: layers.ComputeConfig) -> jax.Array:
    """Returns the decoder's inputs for images: [B, patches, D]."""
    c = self.config
    layer = c.feature_layer % (c.vision.num_hidden_layers + 1)  # 0 is the first layer's input
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
    """Returns the queries, keys and values of a layer of the decoder, given its input."""
    return self.text.qkv(layer, x_BTD, inputs.texts, compute)


def _name_in_language_model(v: nnx.Variable) -> nnx.Variable:
  """Returns a parameter of the decoder with its name in a LLaVA checkpoint."""
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
