"""Tiny checkpoints of a llama, written by safetensors and gguf without transformers."""

import dataclasses
import json
import pathlib
import threading

import gguf
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from distill_jax.models import llama

CONFIG = llama.Config(
  vocab_size=48,
  hidden_size=32,
  intermediate_size=64,
  num_hidden_layers=4,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=8,
  max_position_embeddings=64,
)


def torch_shapes(c: llama.Config) -> dict[str, tuple[int, ...]]:
  """Returns the tensors under the names of transformers, written by hand."""
  D, F, q, kv = (
    c.hidden_size,
    c.intermediate_size,
    c.num_attention_heads * c.head_dim,
    c.num_key_value_heads * c.head_dim,
  )
  shapes = {"model.embed_tokens.weight": (c.vocab_size, D), "model.norm.weight": (D,)}
  if not c.tie_word_embeddings:
    shapes["lm_head.weight"] = (c.vocab_size, D)
  for i in range(c.num_hidden_layers):
    at = f"model.layers.{i}."
    shapes |= {
      at + "input_layernorm.weight": (D,),
      at + "post_attention_layernorm.weight": (D,),
      at + "self_attn.q_proj.weight": (q, D),
      at + "self_attn.k_proj.weight": (kv, D),
      at + "self_attn.v_proj.weight": (kv, D),
      at + "self_attn.o_proj.weight": (D, q),
      at + "mlp.gate_proj.weight": (F, D),
      at + "mlp.up_proj.weight": (F, D),
      at + "mlp.down_proj.weight": (D, F),
    }
  return shapes


def tensors(c: llama.Config = CONFIG, seed: int = 0) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  draw = lambda s: rng.standard_normal(s).astype(np.float32)
  return {name: draw(shape) for name, shape in torch_shapes(c).items()}


def tokenizer_json(size: int) -> str:
  vocab = {f"t{i}": i for i in range(size)}
  return Tokenizer(models.BPE(vocab=vocab, merges=[])).to_str()


def write_folder(
  folder: pathlib.Path,
  c: llama.Config = CONFIG,
  weights: dict | None = None,
  hf: dict | None = None,
) -> pathlib.Path:
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(c.to_hf() if hf is None else hf))
  save_file(tensors(c) if weights is None else weights, folder / "model.safetensors")
  (folder / "tokenizer.json").write_text(tokenizer_json(c.vocab_size))
  return folder


@dataclasses.dataclass
class Counted:
  """A reader that counts the values that are read."""

  inner: object
  values: int = 0
  lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

  def __getattr__(self, name):
    return getattr(self.inner, name)

  def read(self, name, index=None):
    x = self.inner.read(name, index)
    with self.lock:
      self.values += x.size
    return x


GGUF_NAMES = {
  "input_layernorm": "attn_norm",
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "mlp.up_proj": "ffn_up",
  "post_attention_layernorm": "ffn_norm",
  "mlp.gate_proj": "ffn_gate",
  "mlp.down_proj": "ffn_down",
  "model.embed_tokens": "token_embd",
  "model.norm": "output_norm",
  "lm_head": "output",
}


def permute(x: np.ndarray, heads: int) -> np.ndarray:
  """Permutes the rows of q and k as the converter of llama.cpp does."""
  return x.reshape(heads, 2, x.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(x.shape)


def write_gguf(
  path: pathlib.Path,
  c: llama.Config = CONFIG,
  quant: str = "F32",
  weights: dict | None = None,
  meta: dict | None = None,
  tokens: int | None = None,
) -> dict[str, np.ndarray]:
  """Writes a file with the gguf package; returns the tensors that a correct reader returns."""
  kind = gguf.GGMLQuantizationType[quant]
  w = gguf.GGUFWriter(path, "llama")
  w.add_context_length(c.max_position_embeddings)
  w.add_embedding_length(c.hidden_size)
  w.add_block_count(c.num_hidden_layers)
  w.add_feed_forward_length(c.intermediate_size)
  w.add_head_count(c.num_attention_heads)
  w.add_head_count_kv(c.num_key_value_heads)
  w.add_key_length(c.head_dim)
  w.add_value_length(c.head_dim)
  w.add_rope_freq_base(c.rope_theta)
  w.add_layer_norm_rms_eps(c.rms_norm_eps)
  n = c.vocab_size if tokens is None else tokens
  w.add_tokenizer_model("gpt2")
  w.add_tokenizer_pre("smollm")
  w.add_token_list([f"<{i}>" if i < 2 else chr(64 + i) for i in range(n - 1)] + ["BC"])
  w.add_token_types([3, 3] + [1] * (n - 2))
  w.add_token_merges(["B C"])
  w.add_bos_token_id(0)
  w.add_eos_token_id(1)
  w.add_chat_template("{{ messages }}")
  for key, value in (meta or {}).items():
    (w.add_string if isinstance(value, str) else w.add_uint32)(key, value)
  want = {}
  for name, x in (tensors(c) if weights is None else weights).items():
    base = name.removesuffix(".weight")
    if base.startswith("model.layers."):
      _, _, i, inner = base.split(".", 3)
      theirs, heads = f"blk.{i}.{GGUF_NAMES[inner]}", 0
      heads = {"q": c.num_attention_heads, "k": c.num_key_value_heads}.get(inner[10:11], 0)
    else:
      theirs, heads = GGUF_NAMES.get(base, base), 0
    if x.ndim == 1:  # norms stay float32, as llama.cpp has them
      w.add_tensor(theirs + ".weight", x)
      want[name] = x
      continue
    back = gguf.dequantize(gguf.quantize(x, kind), kind).reshape(x.shape)
    want[name] = back  # rows are quantised one by one, so permuting them commutes
    stored = permute(x, heads) if heads and inner.startswith("self_attn") else x
    w.add_tensor(theirs + ".weight", gguf.quantize(stored, kind), raw_dtype=kind)
  w.write_header_to_file()
  w.write_kv_data_to_file()
  w.write_tensors_to_file()
  w.close()
  return want
