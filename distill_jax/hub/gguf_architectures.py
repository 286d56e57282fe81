"""The architectures of llama.cpp, derived from a model's config.json.

llama.cpp knows a model by the name of its architecture and by numbers in the metadata of the file.
Some tensors differ from those of a Hugging Face checkpoint: see Architecture. What llama.cpp does
not compute is refused here, so that no file gives other numbers than the model.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from distill_jax.errors import InputError, bad_value
from distill_jax.types import JsonObject

NAMES = {  # model_type in config.json: name in llama.cpp
  "llama": "llama",
  "mistral": "llama",
  "qwen2": "qwen2",
  "qwen3": "qwen3",
  "qwen3_moe": "qwen3moe",
  "gemma3_text": "gemma3",
  "deepseek_v3": "deepseek2",
}
LOCAL = "sliding_attention"
GEMMA_27B_LAYERS = 62  # with this number of layers, llama.cpp uses the score scale of Gemma 3 27B
SIGMOID = 2  # expert_gating_func
LATENT_EPS = 1e-6  # epsilon of the norms of DeepSeek's latents
LITE_LAYERS = (26, 27)  # with these numbers of layers, llama.cpp reads a DeepSeek V2 Lite


@dataclasses.dataclass(frozen=True)
class Architecture:
  """A model as llama.cpp describes it.

  Attributes:
    name: the name of the architecture, which is also the prefix of most keys in the metadata.
    metadata: the numbers of the model, by key without the prefix.
    rope_factors: divisors of the rotary frequencies, float32 [head_dim / 2], a tensor of the file.
    interleaved: whether llama.cpp rotates neighbours where the checkpoint rotates halves of a head.
    norm_offset: the number that a norm's scale lacks in the checkpoint.
    query_factor: the factor of the scale of the queries' norm.
    latent_heads: (unrotated width of keys, width of values) of a head, whose rows are one matrix in
      the checkpoint; None without latent attention.
  """

  name: str
  metadata: dict[str, int | float | bool | str]
  rope_factors: np.ndarray | None = None
  interleaved: bool = False
  norm_offset: float = 0.0
  query_factor: float = 1.0
  latent_heads: tuple[int, int] | None = None


def architecture(hf: JsonObject) -> Architecture:
  """Returns the architecture for the config.json of a model that this project has written.

  Raises:
    InputError: llama.cpp does not know the family, or lacks a part of the model.
  """
  kind = hf["model_type"]
  if kind not in NAMES:
    families = ", ".join(NAMES)
    expected = f"'hf', because llama.cpp knows {families}, but not {kind!r}"
    raise bad_value("export.format", "gguf", expected, "Change the key")
  name = NAMES[kind]
  common = _common(hf)
  if name == "gemma3":
    return _gemma3(hf, common)
  if name == "deepseek2":
    return _deepseek2(hf, common)
  rope, factors = _rope(name, hf["rope_parameters"], hf["head_dim"])
  numbers = common | rope | _full_attention(hf, common["context_length"])
  if name == "qwen2" and hf["num_attention_heads"] * hf["head_dim"] != hf["hidden_size"]:
    raise _lacking(name, "heads that are together narrower or wider than hidden_size")
  if name == "qwen3moe":
    numbers |= _experts(hf, hf["num_experts"])
    if not hf["norm_topk_prob"]:
      raise _lacking(name, "experts whose weights do not sum to 1 (norm_topk_prob false)")
  return Architecture(name, numbers, factors, interleaved=name == "llama")


def _common(hf: JsonObject) -> dict:
  return {
    "vocab_size": hf["vocab_size"],
    "context_length": hf["max_position_embeddings"],
    "embedding_length": hf["hidden_size"],
    "block_count": hf["num_hidden_layers"],
    "feed_forward_length": hf["intermediate_size"],
    "attention.head_count": hf["num_attention_heads"],
    "attention.head_count_kv": hf["num_key_value_heads"],
    "attention.key_length": hf["head_dim"],
    "attention.value_length": hf["head_dim"],
    "attention.layer_norm_rms_epsilon": float(hf["rms_norm_eps"]),
    "rope.dimension_count": hf["head_dim"],
  }


def _experts(hf: JsonObject, count: int) -> dict:
  return {
    "expert_count": count,
    "expert_used_count": hf["num_experts_per_tok"],
    "expert_feed_forward_length": hf["moe_intermediate_size"],
  }


def _full_attention(hf: JsonObject, positions: int) -> dict:
  """Returns the context, at most a window: llama.cpp has no windows in these architectures.

  Within one window, every position attends to all before it, so that the numbers agree.
  """
  window = hf.get("sliding_window") if hf.get("use_sliding_window", True) else None
  return {"context_length": min(positions, window or positions)}


def _lacking(name: str, part: str) -> InputError:
  return InputError(
    f"llama.cpp lacks {part} in its architecture {name!r}. Set export.format to 'hf', which vLLM "
    "and transformers can load."
  )


def _rope(name: str, rope: JsonObject, width: int) -> tuple[dict, np.ndarray | None]:
  """Returns the metadata of the rotary frequencies, and their divisors for Llama 3's scaling.

  Args:
    name: the architecture.
    rope: `rope_parameters` in config.json.
    width: the width of the rotated part of a head.
  """
  numbers = {"rope.freq_base": float(rope["rope_theta"])}
  kind = rope["rope_type"]
  if kind == "linear" and name != "deepseek2":
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return numbers | scaling, None
  if kind == "llama3" and name == "llama":
    return numbers, _llama3_factors(rope, width)
  if kind == "yarn" and name != "gemma3":
    return numbers | _yarn(name, rope), None
  if kind != "default":
    raise _lacking(name, f"the rope scaling {kind!r}")
  return numbers, None


def _llama3_factors(rope: JsonObject, width: int) -> np.ndarray:
  """Returns what each rotary frequency is divided by (arXiv:2407.21783)."""
  freq = rope["rope_theta"] ** -(np.arange(0, width, 2) / width)
  low, high = rope["low_freq_factor"], rope["high_freq_factor"]
  turns = rope["original_max_position_embeddings"] * freq / (2 * math.pi)
  keep = np.clip((turns - low) / (high - low), 0, 1)
  return (1 / (keep + (1 - keep) / rope["factor"])).astype(np.float32)


def _yarn(name: str, rope: JsonObject) -> dict:
  """Returns the metadata of YaRN (arXiv:2309.00071).

  llama.cpp multiplies cosines and sines by 1 + 0.1 log(factor) and by attn_factor. For DeepSeek, it
  multiplies the scores by (1 + 0.1 mscale log(factor))^2 instead, if both mscales are equal.
  """
  factor = float(rope["factor"])
  numbers = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": factor,
    "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
    "rope.scaling.yarn_beta_fast": float(rope["beta_fast"]),
    "rope.scaling.yarn_beta_slow": float(rope["beta_slow"]),
  }
  if not rope["truncate"]:
    raise _lacking(name, "YaRN without rounded bounds (truncate false)")
  given, mscale, for_all = (
    rope.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim")
  )
  if name == "deepseek2":
    if not mscale or mscale != for_all or given is not None:
      raise _lacking(name, "YaRN with mscale and mscale_all_dim that are missing or differ")
    # llama.cpp multiplies the number by 10, since its converter writes a tenth.
    return numbers | {"rope.scaling.yarn_log_multiplier": 0.1 * mscale}
  amplitude = _sharpness(factor, 1.0)
  if mscale is not None and for_all is not None:
    amplitude = _sharpness(factor, mscale) / _sharpness(factor, for_all)
  if given is not None:
    amplitude = given
  return numbers | {"rope.scaling.attn_factor": amplitude / _sharpness(factor, 1.0)}


def _sharpness(factor: float, mscale: float) -> float:
  return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def _gemma3(hf: JsonObject, common: dict) -> Architecture:
  both = hf["rope_parameters"]
  rope, _ = _rope("gemma3", both["full_attention"], hf["head_dim"])
  numbers = common | rope
  if LOCAL in hf["layer_types"]:
    numbers["rope.freq_base_swa"] = float(both[LOCAL]["rope_theta"])
    numbers["attention.sliding_window"] = hf["sliding_window"]
    numbers["attention.sliding_window_pattern"] = _pattern(hf["layer_types"])
  if cap := hf.get("final_logit_softcapping"):
    numbers["final_logit_softcapping"] = float(cap)
  width = hf["head_dim"]
  if hf["num_hidden_layers"] == GEMMA_27B_LAYERS:
    width = hf["hidden_size"] // hf["num_attention_heads"]
  query_factor = math.sqrt(width / hf["query_pre_attn_scalar"])
  return Architecture("gemma3", numbers, norm_offset=1.0, query_factor=query_factor)


def _pattern(types: list[str]) -> int:
  """Returns n such that every n-th layer has full attention and the others a window."""
  for n in range(2, len(types) + 2):
    if [kind == LOCAL for kind in types] == [(i + 1) % n > 0 for i in range(len(types))]:
      return n
  raise _lacking("gemma3", f"layers with windows in the order {types}")


def _deepseek2(hf: JsonObject, common: dict) -> Architecture:
  """Returns DeepSeek-V3 with latents in the cache, so that all heads share one key."""
  layers, q_rank, rank = hf["num_hidden_layers"], hf["q_lora_rank"], hf["kv_lora_rank"]
  unrotated, rotated = hf["qk_nope_head_dim"], hf["qk_rope_head_dim"]
  if (q_rank is None) != (layers in LITE_LAYERS):
    raise _lacking(
      "deepseek2", f"{layers} layers with q_lora_rank {q_rank}: None goes with 26 or 27 layers only"
    )
  if hf["rms_norm_eps"] != LATENT_EPS:
    raise _lacking("deepseek2", f"norms with rms_norm_eps {hf['rms_norm_eps']}, not {LATENT_EPS}")
  if not hf["rope_interleave"]:
    raise _lacking("deepseek2", "rope that rotates halves of a head (rope_interleave false)")
  rope, _ = _rope("deepseek2", hf["rope_parameters"], rotated)
  numbers = common | rope | _experts(hf, hf["n_routed_experts"])
  numbers |= {
    "attention.head_count_kv": 1,
    "attention.key_length": rank + rotated,
    "attention.value_length": rank,
    "attention.key_length_mla": unrotated + rotated,
    "attention.value_length_mla": hf["v_head_dim"],
    "attention.kv_lora_rank": rank,
    "rope.dimension_count": rotated,
    "leading_dense_block_count": hf["first_k_dense_replace"],
    "expert_shared_count": hf["n_shared_experts"],
    "expert_weights_scale": float(hf["routed_scaling_factor"]),
    "expert_weights_norm": bool(hf["norm_topk_prob"]),
    "expert_gating_func": SIGMOID,
  }
  if q_rank is not None:
    numbers["attention.q_lora_rank"] = q_rank
  if hf["topk_group"] < hf["n_group"]:  # otherwise all groups are chosen
    numbers["expert_group_count"] = hf["n_group"]
    numbers["expert_group_used_count"] = hf["topk_group"]
  return Architecture("deepseek2", numbers, latent_heads=(unrotated, hf["v_head_dim"]))
