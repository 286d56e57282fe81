"""The shape of the decoders that families share, read from config.json and written to it.

A family subclasses `Config` and sets there what tells it apart; see _decoder.py.
"""

from __future__ import annotations

import dataclasses
import re
from typing import ClassVar, Self

from distill_jax.errors import InputError
from distill_jax.models import _rope
from distill_jax.models._family import FamilyDefaults, check_numbers, check_supported
from distill_jax.types import JsonObject

# Buffers that older checkpoints hold; they follow from the config.
BUFFERS = re.compile(r".*\.rotary_emb\.inv_freq")
TINY: JsonObject = {  # the smallest model of every family
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
class Config(FamilyDefaults):
  """The shape of a decoder, under the names of Hugging Face's config.json."""

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
  SUPPORTED_VALUES: ClassVar[JsonObject] = {"hidden_act": "silu"}  # the only values it can do
  QKV_BIAS: ClassVar[bool] = False
  QK_NORM: ClassVar[bool] = False  # of each head, before rope
  NORM_OFFSET: ClassVar[float] = 0.0  # added to the scale of a norm
  OPTIONAL_ZERO: ClassVar[tuple[str, ...]] = ()  # fields

  def __post_init__(self):
    check_numbers(self, self.OPTIONAL_ZERO)
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
  def from_hf(cls, hf: JsonObject) -> Self:
    """From a Hugging Face config.json; what this family cannot do is refused by name."""
    check_supported(hf, cls.SUPPORTED_VALUES, cls.MODEL_TYPE)
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    heads = hf["num_attention_heads"]
    values: JsonObject = {
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

  def to_hf(self) -> JsonObject:
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
  def tied_table(self) -> str | None:
    return "model.embed_tokens.weight" if self.tie_word_embeddings else None

  @property
  def value_head_dim(self) -> int:
    """Width of a head's values."""
    return self.head_dim

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
    """The soft cap of the logits."""
    return None

  @property
  def embed_scale(self) -> float:
    return 1.0
