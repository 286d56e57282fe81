"""Tiny models of every family that llama.cpp knows, with random parameters that all matter."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from distill_jax import registry
from distill_jax.hub import formats, gguf_export
from distill_jax.hub.gguf_tensors import Numbers
from distill_jax.hub.tokenizer import TokenizerFiles
from distill_jax.models import _rope
from distill_jax.nn import params

BASE = {
  "vocab_size": 260,  # three rows more than the tokenizer has tokens
  "hidden_size": 64,
  "intermediate_size": 96,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 32,
  "max_position_embeddings": 512,
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
GEMMA = {"query_pre_attn_scalar": 24, "sliding_window": 4}
EXPERTS = {
  "num_experts": 8,
  "num_experts_per_tok": 3,
  "moe_intermediate_size": 32,
  "norm_topk_prob": True,
}
DEEPSEEK = {
  "num_key_value_heads": 4,
  "head_dim": 48,
  "q_lora_rank": 64,  # with one block of 32 inputs, llama.cpp 0.4.0 rounds more on CPUs with AMX
  "kv_lora_rank": 64,
  "qk_nope_head_dim": 32,
  "qk_rope_head_dim": 16,
  "v_head_dim": 32,
  "n_routed_experts": 8,
  "moe_intermediate_size": 32,
  "n_shared_experts": 2,
  "routed_scaling_factor": 1.7,
}
ALL_LOCAL = {"layer_types": (LOCAL,) * 3, "final_logit_softcapping": 2.0}
# By name: (family, changes of its smallest config).
CASES = {
  "llama": ("llama", {"tie_word_embeddings": False}),
  "llama3": ("llama", {"rope_scaling": _rope.Llama3(8.0, 1.0, 4.0, 64)}),
  "linear": ("llama", {"rope_scaling": _rope.Linear(4.0)}),
  "mistral": ("llama", {"sliding_window": 48}),
  "qwen2": ("qwen2", {"head_dim": 16}),
  "qwen3": ("qwen3", {"rope_scaling": _rope.Yarn(4.0, 64, attention_factor=1.3)}),
  "qwen3_moe": ("qwen3", EXPERTS),
  "gemma3": ("gemma3", GEMMA | {"rope_scaling": _rope.Linear(8.0)}),
  "gemma3_local": ("gemma3", GEMMA | ALL_LOCAL),
  "gemma3_global": ("gemma3", GEMMA | {"layer_types": (GLOBAL,) * 3}),
  "deepseek": (
    "deepseek_v3",
    {"rope_scaling": _rope.Yarn(40.0, 64, mscale=0.7, mscale_all_dim=0.7)},
  ),
  "deepseek_all_groups": (
    "deepseek_v3",
    {"topk_group": 4, "norm_topk_prob": False, "tie_word_embeddings": False},
  ),
}


def config(case: str, **changes):
  family, own = CASES[case]
  base = BASE | (DEEPSEEK if family == "deepseek_v3" else {})
  c = base | own | changes
  if family == "gemma3":
    c.setdefault("layer_types", ((LOCAL, GLOBAL) * 2)[: c["num_hidden_layers"]])
  return dataclasses.replace(registry.load("models", family).TINY, **c)


def shapes(case: str, **changes):
  """The model's shapes, without its values."""
  made, c = registry.load("models", CASES[case][0]), config(case, **changes)
  return jax.eval_shape(lambda key: made.Model(c, key), jax.random.key(0))


def model(case: str, **changes):
  """A random model, not computed by jax: nothing is compiled. Norms are not 1, biases not 0."""
  rng = np.random.default_rng(0)

  def draw(v):
    axes = v.get_metadata()["axes"]
    x = rng.standard_normal(v.shape)
    if "norm" in axes or "bias" in axes:
      x = 0.2 * x + ("norm" in axes and not case.startswith("gemma"))
    else:
      x *= (0.02 if "table" in axes else v.shape[-1] ** -0.5) * 1.2
    return v.replace(jnp.asarray(x.astype(np.float32)))

  return params.map_params(draw, shapes(case, **changes))


def tokenizer() -> TokenizerFiles:
  """A byte-level BPE of 257 tokens: the bytes, and one merge, as llama.cpp wants at least one."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  made = Tokenizer(models.BPE({c: i for i, c in enumerate([*letters, "ab"])}, [("a", "b")]))
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  return TokenizerFiles(made.to_str(), None, {})


def export(made, folder: Path, quant: str = "F32", embedding: str = "", **options) -> Path:
  """Writes a model; returns the file."""
  kept = ("widths", "trained")
  more = {key: options.pop(key) for key in kept if key in options}
  numbers = Numbers(quant, embedding or formats.default_embedding(quant), **more)
  target = folder / f"out-{quant}"
  given = {"tokenizer": tokenizer(), "generation": {"eos_token_id": 1}, "card": "# card\n"}
  gguf_export.export_gguf(made, target, numbers=numbers, **given | options)
  return target / f"model-{quant}.gguf"
