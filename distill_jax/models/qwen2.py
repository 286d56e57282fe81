"""Qwen2 and Qwen2.5 (arXiv:2412.15115): Llama with biases of queries, keys and values."""

from __future__ import annotations

import dataclasses
from typing import Any

from distill_jax.models import _decoder, _windows
from distill_jax.models._decoder import Block
from distill_jax.models._windows import Model

__all__ = ["CONFIGS", "HF_MODEL_TYPES", "TINY", "Block", "Config", "Model"]

HF_MODEL_TYPES = ("qwen2",)  # model_type in config.json


@dataclasses.dataclass(frozen=True)
class Config(_windows.Config):
  """A model's architecture, under Hugging Face's field names."""

  rms_norm_eps: float = 1e-6

  MODEL_TYPE = "qwen2"
  ARCHITECTURE = "Qwen2ForCausalLM"
  QKV_BIAS = True


TINY = Config(**_decoder.TINY)


def _qwen25(
  rows: int, width: int, mlp: int, layers: int, heads: int, kv: int, **more: Any
) -> Config:
  return Config(
    vocab_size=rows,
    hidden_size=width,
    intermediate_size=mlp,
    num_hidden_layers=layers,
    num_attention_heads=heads,
    num_key_value_heads=kv,
    head_dim=width // heads,
    max_position_embeddings=32_768,
    rope_theta=1_000_000.0,
    **more,
  )


CONFIGS = {
  "tiny": TINY,
  "tiny-window": dataclasses.replace(
    TINY, sliding_window=5, layer_types=(_windows.LOCAL, _windows.GLOBAL, _windows.LOCAL)
  ),
  "qwen2.5-0.5b": _qwen25(151_936, 896, 4_864, 24, 14, 2, tie_word_embeddings=True),
  "qwen2.5-1.5b": _qwen25(151_936, 1_536, 8_960, 28, 12, 2, tie_word_embeddings=True),
  "qwen2.5-7b": _qwen25(152_064, 3_584, 18_944, 28, 28, 4),
  "qwen2.5-14b": _qwen25(152_064, 5_120, 13_824, 48, 40, 8),
  "qwen2.5-32b": _qwen25(152_064, 5_120, 27_648, 64, 40, 8),
}
