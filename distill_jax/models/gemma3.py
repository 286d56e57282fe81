"""Gemma 3, text only: alternating local and global attention (arXiv:2503.19786).

Of checkpoints that also read images (`gemma3`: 4B, 12B and 27B), the text part is read.
"""

from __future__ import annotations

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.errors import bad_value
from distill_jax.models import _decoder, _rope
from distill_jax.models._windows import GLOBAL, LOCAL, check_kinds
from distill_jax.nn import attention, layers, sharding
from distill_jax.types import Inputs, JsonObject

HF_MODEL_TYPES = ("gemma3_text", "gemma3")  # model_type in config.json
OTHER_STARTS = {  # of the tensors of the text part, in checkpoints that also read images
  "language_model.model.": "model.",
  "model.language_model.": "model.",
  "language_model.lm_head.": "lm_head.",
}
VISION = ("vision_tower.", "multi_modal_projector.")  # the other tensors there
UNREAD_TOKENS = ("<image_soft_token>",)  # the 1B model's embedding has no row for it
TEXT_DEFAULTS: JsonObject = {  # of Gemma3TextConfig, for keys that text_config may lack
  "vocab_size": 262_208,
  "hidden_size": 2_304,
  "intermediate_size": 9_216,
  "num_hidden_layers": 26,
  "num_attention_heads": 8,
  "num_key_value_heads": 4,
  "head_dim": 256,
  "max_position_embeddings": 131_072,
  "rms_norm_eps": 1e-6,
}


@dataclasses.dataclass(frozen=True)
class Config(_decoder.Config):
  """A model's architecture, under Hugging Face's field names.

  `rope_theta` and `rope_scaling` apply to global layers, which `layer_types` lists.
  """

  rms_norm_eps: float = 1e-6
  rope_theta: float = 1_000_000.0
  tie_word_embeddings: bool = True
  query_pre_attn_scalar: int = 256
  sliding_window: int = 4_096
  rope_local_base_freq: float = 10_000.0
  layer_types: tuple[str, ...] = ()
  final_logit_softcapping: float | None = None

  MODEL_TYPE = "gemma3_text"
  ARCHITECTURE = "Gemma3ForCausalLM"
  SUPPORTED_VALUES = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attn_logit_softcapping": None,  # transformers reads it but does not apply it
    "use_bidirectional_attention": False,
  }
  QK_NORM = True
  NORM_OFFSET = 1.0

  def __post_init__(self):
    super().__post_init__()
    check_kinds(self.layer_types, self.num_hidden_layers)

  @classmethod
  def from_hf(cls, hf: JsonObject) -> Self:
    if hf.get("model_type") == "gemma3":
      hf = TEXT_DEFAULTS | hf["text_config"]
    rope = hf.get("rope_parameters") or {}  # since transformers 5, by kind of layer
    theta = {"rope_theta": hf.get("rope_theta", 1_000_000.0)}
    global_rope = theta | (rope.get(GLOBAL) or {}) | (hf.get("rope_scaling") or {})
    local_rope = {"rope_theta": hf.get("rope_local_base_freq", 10_000.0)} | (rope.get(LOCAL) or {})
    if _rope.read(local_rope, hf["max_position_embeddings"]) is not None:
      kind = local_rope["rope_type"]
      expected = f"'default', the only supported value for {LOCAL}"
      raise bad_value("rope_type in config.json", kind, expected, "Use another model")
    # In older configs, every N-th layer is global.
    every = hf.get("sliding_window_pattern", 6)
    types = hf.get("layer_types") or _layer_types(hf["num_hidden_layers"], every)
    own = {"layer_types": tuple(types), "rope_local_base_freq": local_rope["rope_theta"]}
    return super().from_hf({**hf, **own, "rope_scaling": global_rope})

  def to_hf(self) -> JsonObject:
    hf = super().to_hf()
    local_rope = {"rope_type": "default", "rope_theta": self.rope_local_base_freq}
    both = {GLOBAL: hf["rope_parameters"], LOCAL: local_rope}
    return {**hf, "layer_types": list(self.layer_types), "rope_parameters": both}

  def ignores_tensor(self, name: str) -> bool:
    return name.removeprefix("model.").startswith(VISION) or super().ignores_tensor(name)

  def keep_layers(self, kept: tuple[int, ...]) -> Self:
    types = tuple(self.layer_types[i] for i in kept)
    return dataclasses.replace(self, num_hidden_layers=len(kept), layer_types=types)

  def window_at(self, layer: int) -> int | None:
    return self.sliding_window if self.layer_types[layer] == LOCAL else None

  @property
  def attention_scale(self) -> float:
    return self.query_pre_attn_scalar**-0.5

  @property
  def soft_cap(self) -> float | None:
    return self.final_logit_softcapping

  @property
  def embed_scale(self) -> float:
    return self.hidden_size**0.5


class Block(_decoder.Block):
  """One layer, with norms also after attention and after the feed-forward."""

  attn_post_norm: nnx.Param
  MLP_NORM = "pre_feedforward_layernorm"
  activation = staticmethod(jax.nn.gelu)  # the tanh approximation

  def __init__(self, c: Config, key: jax.Array):
    super().__init__(c, key)
    declare = _decoder.declare(key, c)
    self.attn_post_norm = declare.rms_norm("post_attention_layernorm", c.hidden_size)
    self.mlp_post_norm = declare.rms_norm("post_feedforward_layernorm", c.hidden_size)

  def project_heads(self, a_BTHh: jax.Array) -> jax.Array:
    return self.norm(super().project_heads(a_BTHh), self.attn_post_norm)

  def feed_forward(self, x_BTD: jax.Array, rules: sharding.Rules) -> jax.Array:
    return self.norm(super().feed_forward(x_BTD, rules), self.mlp_post_norm)


class Model(_decoder.Model):
  """A decoder: tokens to hidden states and the unembedding."""

  config: Config

  @staticmethod
  def layer_stacks(c: Config) -> _decoder.LayerStacks:
    return (layers.LayerStack("layers", Block, c.num_hidden_layers),)

  def position_inputs(self, inputs: Inputs) -> _decoder.PositionInputs:
    """Returns a function of the layer's number, so that one scan covers both kinds of layer."""
    c, positions_BT = self.config, inputs.positions_BT
    local_freq = _rope.frequencies(c.rope_local_base_freq, c.head_dim, None)
    global_freq = _rope.frequencies(c.rope_theta, c.head_dim, c.rope_scaling)
    local_angles = layers.rope_angles(positions_BT, local_freq)
    global_angles = layers.rope_angles(positions_BT, global_freq)
    is_local_L = jnp.asarray([kind == LOCAL for kind in c.layer_types])

    def of_layer(layer: int | jax.Array) -> tuple[layers.Angles, attention.Window]:
      is_local = is_local_L[layer]
      angles = jax.tree.map(lambda a, b: jnp.where(is_local, a, b), local_angles, global_angles)
      return angles, attention.OneOf((None, c.sliding_window), is_local.astype(jnp.int32))

    return of_layer


def _layer_types(layers: int, global_every: int = 6) -> tuple[str, ...]:
  return tuple(LOCAL if (i + 1) % global_every else GLOBAL for i in range(layers))


TINY = Config(
  **_decoder.TINY,
  query_pre_attn_scalar=12,
  sliding_window=4,
  layer_types=_layer_types(3, global_every=2),
)

CONFIGS = {
  "tiny": TINY,
  "tiny-cap": dataclasses.replace(TINY, final_logit_softcapping=2.0),
  "gemma-3-1b": Config(
    vocab_size=262_144,
    hidden_size=1_152,
    intermediate_size=6_912,
    num_hidden_layers=26,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=256,
    max_position_embeddings=32_768,
    sliding_window=512,
    layer_types=_layer_types(26),
  ),
  "gemma-3-4b": Config(
    vocab_size=262_208,
    hidden_size=2_560,
    intermediate_size=10_240,
    num_hidden_layers=34,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    max_position_embeddings=131_072,
    sliding_window=1_024,
    layer_types=_layer_types(34),
    rope_scaling=_rope.Linear(8.0),
  ),
}
