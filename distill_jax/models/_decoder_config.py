"""The architecture of decoders, converted from and to config.json.

A family subclasses `Config` and sets its particulars there; see _decoder.py.
"""

from __future__ import annotations

import dataclasses
import re
from typing import ClassVar, Self

from distill_jax.errors import bad_value
from distill_jax.models import _rope
from distill_jax.models._family import FamilyDefaults, check_numbers, check_supported
from distill_jax.types import JsonObject

# Buffers in older checkpoints, which can be computed from the config.
BUFFERS = re.compile(r".*\.rotary_emb\.inv_freq")
TINY: JsonObject = {  # fields of the smallest model of every family
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
  """A decoder's architecture, under Hugging Face's field names."""

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

  # Properties of a family: the entries that it writes to config.json, and its computation.
  MODEL_TYPE: ClassVar[str]
  ARCHITECTURE: ClassVar[str]
  SUPPORTED_VALUES: ClassVar[JsonObject] = {"hidden_act": "silu"}  # the only supported value
  QKV_BIAS: ClassVar[bool] = False
  QK_NORM: ClassVar[bool] = False  # whether queries and keys are normed before rope
  NORM_OFFSET: ClassVar[float] = 0.0  # added to the scale of a norm
  OPTIONAL_ZERO: ClassVar[tuple[str, ...]] = ()  # fields that may be 0

  def __post_init__(self):
    check_numbers(self, self.OPTIONAL_ZERO)
    if self.rope_dim % 2:
      expected = f"a width of which rope rotates an even part, not {self.rope_dim}"
      raise bad_value("head_dim", self.head_dim, expected, "Correct the model's config")
    if self.num_attention_heads % self.num_key_value_heads:
      expected = f"a multiple of num_key_value_heads, {self.num_key_value_heads}"
      action = "Correct the model's config"
      raise bad_value("num_attention_heads", self.num_attention_heads, expected, action)

  @classmethod
  def from_hf(cls, hf: JsonObject) -> Self:
    """Returns the config for a Hugging Face config.json; unsupported values raise InputError."""
    check_supported(hf, cls.SUPPORTED_VALUES, cls.MODEL_TYPE)
    # Of the two, transformers uses the older key.
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    heads = hf["num_attention_heads"]
    values: JsonObject = {
      "num_key_value_heads": hf.get("num_key_value_heads") or heads,
      "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
      "rms_norm_eps": hf["rms_norm_eps"],
      "rope_theta": rope.get("rope_theta", hf.get("rope_theta", 10_000.0)),
      "rope_scaling": _rope.read(rope, hf["max_position_embeddings"]),
    }
    for f in dataclasses.fields(cls):
      if f.name not in values and (f.name in hf or f.default is dataclasses.MISSING):
        values[f.name] = hf[f.name]
      if f.type in ("float", "float | None") and type(values.get(f.name)) is int:
        values[f.name] = float(values[f.name])
    return cls(**values)

  def to_hf(self) -> JsonObject:
    """Returns the config.json of this model."""
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
      # transformers 5 reads the first key; older versions and vLLM read the other two.
      "rope_parameters": {**scaling, "rope_theta": theta},
      "rope_theta": theta,
      "rope_scaling": scaling if self.rope_scaling else None,
    }

  def keep_layers(self, kept: tuple[int, ...]) -> Self:
    """Returns the config of a model with only these layers, in this order."""
    return dataclasses.replace(self, num_hidden_layers=len(kept))

  def ignores_tensor(self, name: str) -> bool:
    """Returns whether a checkpoint may hold this tensor although the model does not use it."""
    return BUFFERS.fullmatch(name) is not None

  @property
  def head_rows(self) -> int:
    """Number of outcomes that the head predicts."""
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
    """Width of the part of a head that rope rotates."""
    return self.head_dim

  @property
  def window(self) -> int | None:
    """Number of positions that a position attends to, itself included; None for all."""
    return None

  def window_at(self, layer: int) -> int | None:
    """Returns the window of one layer; None for full attention."""
    return self.window

  @property
  def attention_width(self) -> int:
    """Multiply-adds of a query head per attended position, for the score and the value."""
    return 2 * self.head_dim

  @property
  def decode_attention_width(self) -> int:
    """Multiply-adds of a query head per cached position in decoding."""
    return self.attention_width

  @property
  def cache_width(self) -> int:
    """Number of elements that a layer's cache stores per position."""
    return 2 * self.num_key_value_heads * self.head_dim

  @property
  def expert_groups(self) -> int:
    """Number of groups of experts of equal size, among which the router chooses."""
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
