"""Llama 2 and 3, SmolLM2, Mistral (arXiv:2302.13971, arXiv:2407.21783, arXiv:2310.06825)."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from distill_jax.models import _decoder, _windows
from distill_jax.models._decoder import Block, Model
from distill_jax.models._rope import Llama3
from distill_jax.types import JsonObject

__all__ = ["CONFIGS", "HF_MODEL_TYPES", "TINY", "Block", "Config", "Model"]

HF_MODEL_TYPES = ("llama", "mistral")  # model_type in config.json


@dataclasses.dataclass(frozen=True)
class Config(_decoder.Config):
  """A model's architecture, under Hugging Face's field names.

  With a sliding window it is a Mistral.
  """

  sliding_window: int | None = None

  MODEL_TYPE = "llama"
  ARCHITECTURE = "LlamaForCausalLM"
  SUPPORTED_VALUES = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}

  @classmethod
  def from_hf(cls, hf: JsonObject) -> Self:
    # transformers ignores a sliding window in the config.json of a Llama.
    window = _windows.size(hf) if hf.get("model_type") == "mistral" else None
    return super().from_hf({**hf, "sliding_window": window})

  def to_hf(self) -> JsonObject:
    hf = super().to_hf()
    if self.sliding_window is None:
      del hf["sliding_window"]
      return hf
    return {**hf, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}

  @property
  def window(self) -> int | None:
    return self.sliding_window


TINY = Config(**_decoder.TINY)


def _llama3(factor: float, **shape: Any) -> Config:
  return Config(
    vocab_size=128_256,
    max_position_embeddings=131_072,
    rope_theta=500_000.0,
    num_key_value_heads=8,
    rope_scaling=Llama3(factor, 1.0, 4.0, 8_192),
    **shape,
  )


CONFIGS = {
  "tiny": TINY,
  "tiny-window": dataclasses.replace(TINY, sliding_window=5),
  "smollm2-135m": Config(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1_536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    max_position_embeddings=8_192,
    rope_theta=100_000.0,
    tie_word_embeddings=True,
  ),
  "llama-3.2-1b": _llama3(
    32.0,
    hidden_size=2_048,
    intermediate_size=8_192,
    num_hidden_layers=16,
    num_attention_heads=32,
    head_dim=64,
    tie_word_embeddings=True,
  ),
  "llama-3.2-3b": _llama3(
    32.0,
    hidden_size=3_072,
    intermediate_size=8_192,
    num_hidden_layers=28,
    num_attention_heads=24,
    head_dim=128,
    tie_word_embeddings=True,
  ),
  "llama-3.1-8b": _llama3(
    8.0,
    hidden_size=4_096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    head_dim=128,
  ),
  "llama-3.3-70b": _llama3(
    8.0,
    hidden_size=8_192,
    intermediate_size=28_672,
    num_hidden_layers=80,
    num_attention_heads=64,
    head_dim=128,
  ),
  "mistral-7b-v0.1": Config(
    vocab_size=32_000,
    hidden_size=4_096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=32_768,
    sliding_window=4_096,
  ),
}
