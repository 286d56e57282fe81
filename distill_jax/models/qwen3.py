"""Qwen3 (arXiv:2505.09388): decoders with norms of queries and keys, some with experts."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax

from distill_jax.errors import bad_value
from distill_jax.models import _decoder, _windows
from distill_jax.models._declare import Declare
from distill_jax.models._decoder import Block
from distill_jax.models._experts import Experts, check_top_k, softmax_top_k
from distill_jax.nn import layers, sharding
from distill_jax.types import JsonObject

__all__ = ["CONFIGS", "HF_MODEL_TYPES", "TINY", "Block", "Config", "Model"]

HF_MODEL_TYPES = ("qwen3", "qwen3_moe")  # model_type in config.json


@dataclasses.dataclass(frozen=True)
class Config(_windows.Config):
  """A model's architecture, under Hugging Face's field names. With experts, it is a qwen3_moe."""

  rms_norm_eps: float = 1e-6
  num_experts: int | None = None
  num_experts_per_tok: int | None = None
  moe_intermediate_size: int | None = None
  norm_topk_prob: bool = False

  MODEL_TYPE = "qwen3"
  ARCHITECTURE = "Qwen3ForCausalLM"
  SUPPORTED_VALUES = {"hidden_act": "silu", "attention_bias": False}
  QK_NORM = True

  def __post_init__(self):
    super().__post_init__()
    keys = "num_experts", "num_experts_per_tok", "moe_intermediate_size"
    missing = [key for key in keys if not getattr(self, key)]
    if 0 < len(missing) < len(keys):
      expected = f"a number, since a mixture of experts needs {', '.join(keys)}"
      raise bad_value(missing[0], None, expected, "Correct the model's config")
    if self.num_experts is not None:
      check_top_k(self.num_experts_per_tok or 0, self.num_experts)
    if self.num_experts is not None and self.layer_types:
      expected = "None, since mixtures of experts with windows are not supported"
      action = "Set use_sliding_window to false if the model was trained with full attention"
      raise bad_value("sliding_window", self.sliding_window, expected, action)

  @classmethod
  def from_hf(cls, hf: JsonObject) -> Self:
    if hf.get("model_type") != "qwen3_moe":
      return super().from_hf(hf)
    if (step := hf.get("decoder_sparse_step", 1)) != 1:
      key, expected = "decoder_sparse_step in config.json", "1, i.e. experts in every layer"
      raise bad_value(key, step, expected, "Use another model")
    if dense := hf.get("mlp_only_layers"):
      key, expected = "mlp_only_layers in config.json", "[], i.e. experts in every layer"
      raise bad_value(key, dense, expected, "Use another model")
    # transformers 5 writes num_local_experts, its internal name of num_experts.
    experts = hf["num_experts"] if "num_experts" in hf else hf["num_local_experts"]
    needed = {k: hf[k] for k in ("num_experts_per_tok", "moe_intermediate_size")}
    windows = {"max_window_layers": 0}  # transformers applies a window to all layers or to none
    return super().from_hf({**hf, **needed, **windows, "num_experts": experts})

  def to_hf(self) -> JsonObject:
    hf = super().to_hf()
    if self.num_experts is None:
      for f in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"):
        del hf[f]
      return hf
    moe = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
    return {**hf, **moe, "decoder_sparse_step": 1, "mlp_only_layers": []}


class SparseBlock(Block):
  """A layer whose feed-forward is a mixture of experts."""

  experts: Experts
  HAS_DENSE_MLP = False

  config: Config

  def declare_mlp(self, declare: Declare) -> None:
    c = self.config
    assert c.num_experts is not None and c.moe_intermediate_size is not None
    self.experts = Experts(declare, c.hidden_size, c.num_experts, c.moe_intermediate_size)

  def feed_forward(self, x_BTD: jax.Array, rules: sharding.Rules) -> jax.Array:
    y_BTD = self.norm(x_BTD, self.mlp_norm)
    return self.experts(y_BTD, *self.route(y_BTD), rules)

  def route(self, y_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (ids, weights) [B, T, K] of the experts of each normed position."""
    c, logits_BTE = self.config, self.experts.logits(y_BTD)
    assert c.num_experts_per_tok is not None
    return softmax_top_k(logits_BTE, c.num_experts_per_tok, c.norm_topk_prob)


class Model(_windows.Model):
  """A decoder: tokens to hidden states and the unembedding."""

  @staticmethod
  def layer_stacks(c: Config) -> _decoder.LayerStacks:
    block = Block if c.num_experts is None else SparseBlock
    return (layers.LayerStack("layers", block, c.num_hidden_layers),)


TINY = Config(**_decoder.TINY)


def _qwen3(width: int, mlp: int, depth: int, heads: int, kv: int = 8, **more: Any) -> Config:
  return Config(
    vocab_size=151_936,
    hidden_size=width,
    intermediate_size=mlp,
    num_hidden_layers=depth,
    num_attention_heads=heads,
    num_key_value_heads=kv,
    head_dim=128,
    max_position_embeddings=40_960,
    rope_theta=1_000_000.0,
    **more,
  )


CONFIGS = {
  "tiny": TINY,
  "tiny-moe": dataclasses.replace(
    TINY, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=True
  ),
  "qwen3-0.6b": _qwen3(1_024, 3_072, 28, 16, tie_word_embeddings=True),
  "qwen3-1.7b": _qwen3(2_048, 6_144, 28, 16, tie_word_embeddings=True),
  "qwen3-4b": _qwen3(2_560, 9_728, 36, 32, tie_word_embeddings=True),
  "qwen3-8b": _qwen3(4_096, 12_288, 36, 32),
  "qwen3-14b": _qwen3(5_120, 17_408, 40, 40),
  "qwen3-32b": _qwen3(5_120, 25_600, 64, 64),
  "qwen3-30b-a3b": _qwen3(
    2_048,
    6_144,
    48,
    32,
    kv=4,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    norm_topk_prob=True,
  ),
}
