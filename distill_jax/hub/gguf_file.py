"""Weights, config and tokenizer of a GGUF file (llama.cpp's format), under Hugging Face names.

The `gguf` package knows the block formats and dequantises them. The header is parsed here:
its reader makes an object of every string (1.8 s for a vocabulary of 49,152) and does not
check lengths. As in llama.cpp, tensors have to lie back to back in the order listed, so
that no damaged offset can give the bytes of another tensor.
"""

from __future__ import annotations

import math
import mmap
import pathlib
import re
import struct
from typing import Any, NamedTuple

import numpy as np

from distill_jax.errors import InputError
from distill_jax.hub.weights import Index
from distill_jax.runtime import extras
from distill_jax.types import JsonObject

with extras.needed("gguf"):
  import gguf
  from gguf import quants

# The value types of the metadata, as struct codes.
SCALARS = {
  0: "B",
  1: "b",
  2: "H",
  3: "h",
  4: "I",
  5: "i",
  6: "f",
  7: "?",
  10: "Q",
  11: "q",
  12: "d",
}
STRING, ARRAY = 8, 9
NAMES = {
  "token_embd": "model.embed_tokens",
  "output_norm": "model.norm",
  "output": "lm_head",
}
IN_LAYER = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
ROWS = 64  # dequantised at a time: the temporaries stay in the cache


class GGUFTensor(NamedTuple):
  """Where one tensor lies."""

  kind: gguf.GGMLQuantizationType
  shape: tuple[int, ...]  # as numpy has it, slowest axis first
  begin: int
  end: int
  heads: int  # of rows that llama.cpp has permuted; 0 where it has not


class GGUFFile:
  """Reads a GGUF file's tensors, dequantised to float32, a slice at a time.

  Attributes:
    meta: the file's metadata.

  Raises:
    InputError: the file is truncated or damaged, or its architecture is not supported.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    self.files: tuple[pathlib.Path, ...] = (path,)
    cursor = _Cursor(path)
    count, keys = cursor.start()
    self.meta = cursor.metadata(keys)
    if (arch := self.meta.get("general.architecture")) != "llama":
      raise InputError(
        f"{path} has architecture {arch!r}; GGUF files of 'llama' are read, for others give the "
        "safetensors folder"
      )
    self._entries = self._named(cursor.tensors(count, self.meta.get("general.alignment", 32)))
    self._map = np.frombuffer(cursor.data, np.uint8)

  def number(self, key: str, default: Any = None, kind: type[int] | type[float] = int) -> Any:
    """A number of the metadata, under `llama.`; InputError where it is absent or none."""
    value: Any = self.meta.get(f"llama.{key}", default)
    if type(value) is not kind or not 0 < value < 2**40:
      raise InputError(
        f"{self.path} has llama.{key}={value!r:.60} where a positive {kind.__name__} was expected; "
        "fetch the file again, or give the safetensors folder"
      )
    return value

  def _named(self, entries: dict[str, GGUFTensor]) -> dict[str, GGUFTensor]:
    """Under Hugging Face names; what has none keeps its own, and is refused as unknown."""
    heads = self.number("attention.head_count")
    permuted = {"attn_q": heads, "attn_k": self.number("attention.head_count_kv", heads)}
    named = {}
    for name, e in entries.items():
      if m := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name):
        hf = f"model.layers.{m[1]}.{IN_LAYER[m[2]]}.weight" if m[2] in IN_LAYER else name
        e = e._replace(heads=permuted.get(m[2], 0))
        if e.heads and e.shape[0] % (2 * e.heads):
          raise InputError(f"{self.path}: {name} has {e.shape[0]} rows for {e.heads} heads")
      else:
        base, _, end = name.rpartition(".")
        hf = f"{NAMES[base]}.{end}" if base in NAMES else name
      named[hf] = e
    return named

  def names(self) -> set[str]:
    return set(self._entries)

  def shape(self, name: str) -> tuple[int, ...]:
    return self._entries[name].shape

  def dtype(self, name: str) -> np.dtype:
    return np.dtype(np.float32)

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """float32. Only the rows asked for are dequantised."""
    e = self._entries[name]
    index = index or (slice(None),) * len(e.shape)
    raw = self._map[e.begin : e.end]
    if len(e.shape) == 1:
      return _dequantise(raw[None], e.kind)[0][index]
    raw = raw.reshape(math.prod(e.shape[:-1]), -1)
    if len(e.shape) > 2:
      return _dequantise(raw, e.kind).reshape(e.shape)[index]
    if e.heads:
      # llama.cpp pairs rows (i, i + h/2) of each head; back to the halves of Hugging Face.
      rows = np.arange(e.shape[0]).reshape(e.heads, -1, 2).swapaxes(1, 2).reshape(-1)
      raw = raw[rows[index[0]]]
    else:
      raw = raw[index[0]]
    return _dequantise(raw, e.kind)[:, index[1]]

  def config(self) -> JsonObject:
    """The Hugging Face config.json of this model."""
    get = self.number
    for key in ("rope.scaling.type", "expert_count"):
      if self.meta.get(f"llama.{key}", 0) not in (0, "none"):
        raise InputError(f"{self.path} has llama.{key}; give the safetensors folder of this model")
    if "rope_freqs.weight" in self._entries:
      raise InputError(
        f"{self.path} holds rope_freqs.weight, the rope scaling of Llama 3.1 as a table; give the "
        "safetensors folder of this model"
      )
    heads, width = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", get("rope.dimension_count", width // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
      if get(key, head_dim) != head_dim:
        raise InputError(f"{self.path} has llama.{key}={get(key)} for heads of width {head_dim}")
    embed = self._entries.get("model.embed_tokens.weight")
    if embed is None:
      raise InputError(f"{self.path} holds no token_embd.weight; the file is not a language model")
    ids = {
      f"{ours}_token_id": self.meta.get(f"tokenizer.ggml.{theirs}_token_id")
      for ours, theirs in {"bos": "bos", "eos": "eos", "pad": "padding"}.items()
    }
    return {
      "architectures": ["LlamaForCausalLM"],
      "model_type": "llama",
      "hidden_act": "silu",
      "vocab_size": embed.shape[0],
      "hidden_size": width,
      "intermediate_size": get("feed_forward_length"),
      "num_hidden_layers": get("block_count"),
      "num_attention_heads": heads,
      "num_key_value_heads": get("attention.head_count_kv", heads),
      "head_dim": head_dim,
      "max_position_embeddings": get("context_length"),
      "rms_norm_eps": _shortest_decimal(get("attention.layer_norm_rms_epsilon", kind=float)),
      "rope_theta": _shortest_decimal(get("rope.freq_base", 10_000.0, float)),
      # llama.cpp writes the output projection only where it is not the embedding table.
      "tie_word_embeddings": "lm_head.weight" not in self._entries,
      **{k: v for k, v in ids.items() if v is not None},
    }


def _dequantise(raw: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
  """Rows of blocks (uint8 [n, bytes]) to float32 [n, width]."""
  if kind == gguf.GGMLQuantizationType.F32:
    return raw.view(np.float32)
  if kind == gguf.GGMLQuantizationType.F16:
    return raw.view(np.float16).astype(np.float32)
  format_ = getattr(quants, kind.name)
  format_.init_grid()
  block, size = gguf.GGML_QUANT_SIZES[kind]
  out = np.empty((len(raw), raw.shape[1] // size * block), np.float32)
  # A damaged scale can be NaN: it is passed on, and the first loss stops the run.
  with np.errstate(invalid="ignore", over="ignore"):
    for i in range(0, len(raw), ROWS):
      out[i : i + ROWS] = format_.dequantize_rows(raw[i : i + ROWS])
  return out


class _Cursor:
  """Walks a header; every read is checked against the end of the file."""

  def __init__(self, path: pathlib.Path):
    self.path, self.at = path, 0
    with path.open("rb") as f:
      self.size = path.stat().st_size
      if self.size < 24:
        raise InputError(f"{path} is {self.size} bytes, too few for a GGUF file; fetch it again")
      self.data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)

  def damaged(self, fault: str) -> InputError:
    return InputError(f"{self.path} is truncated or damaged: {fault}; fetch the file again")

  def take(self, n: int) -> bytes:
    if n > self.size - self.at:
      raise self.damaged(f"{n} bytes were expected at byte {self.at} of {self.size}")
    self.at += n
    return self.data[self.at - n : self.at]

  def scalar(self, code: str) -> Any:
    return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

  def string(self) -> str:
    at = self.at
    try:
      return self.take(self.scalar("Q")).decode()
    except UnicodeDecodeError:
      raise self.damaged(f"the string at byte {at} is not UTF-8") from None

  def value(self, kind: int) -> Any:
    if kind in SCALARS:
      return self.scalar(SCALARS[kind])
    if kind == STRING:
      return self.string()
    if kind != ARRAY:
      raise self.damaged(f"a value of unknown type {kind} at byte {self.at}")
    inner, n = self.scalar("I"), self.scalar("Q")
    if inner in SCALARS:
      return np.frombuffer(self.take(n * struct.calcsize(SCALARS[inner])), SCALARS[inner]).tolist()
    if inner != STRING or n > (self.size - self.at) // 8:
      raise self.damaged(f"an array of {n} values of type {inner} at byte {self.at}")
    return [self.string() for _ in range(n)]

  def start(self) -> tuple[int, int]:
    """(number of tensors, number of metadata keys)."""
    magic, version = self.take(4), self.scalar("I")
    if magic != b"GGUF" or version not in (2, 3):
      raise InputError(
        f"{self.path} begins with {magic!r} version {version}; GGUF version 2 or 3 was expected"
      )
    return self.scalar("Q"), self.scalar("Q")

  def metadata(self, n: int) -> JsonObject:
    meta: JsonObject = {}
    for _ in range(n):
      key = self.string()
      if key in meta:
        raise self.damaged(f"it has {key!r} twice")
      meta[key] = self.value(self.scalar("I"))
    return meta

  def tensors(self, n: int, align: object) -> dict[str, GGUFTensor]:
    """The table of tensors, checked to fill the rest of the file exactly."""
    if type(align) is not int or not 0 < align <= 2**16 or align & (align - 1):
      raise self.damaged(f"its alignment is {align!r:.60}, no power of two")
    table = []
    for _ in range(n):
      name, dims = self.string(), self.scalar("I")
      if dims > 4:
        raise self.damaged(f"{name} has {dims} axes")
      shape = tuple(self.scalar("Q") for _ in range(dims))[::-1]
      table.append((name, shape, self.scalar("I"), self.scalar("Q")))
    start = at = -(-self.at // align) * align
    entries: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in table:
      if name in entries:
        raise self.damaged(f"it has tensor {name} twice")
      type_ = self._kind(name, kind)
      block, size = gguf.GGML_QUANT_SIZES[type_]
      if not shape or shape[-1] % block:
        raise self.damaged(f"{name} has shape {shape} in blocks of {block}")
      end = at + math.prod(shape) // block * size
      if start + offset != at or end > self.size:
        raise self.damaged(
          f"{name} of shape {shape} begins at byte {start + offset} where {at} was expected, and "
          f"would end at {end} of {self.size}"
        )
      entries[name] = GGUFTensor(type_, shape, at, end, 0)
      at = -(-end // align) * align
    if self.size > at:
      raise self.damaged(f"its tensors end at byte {at} of {self.size}")
    return entries

  def _kind(self, name: str, kind: int) -> gguf.GGMLQuantizationType:
    known = {int(k): k for k in gguf.GGMLQuantizationType}
    plain = kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
    if kind not in known or not (plain or hasattr(quants, known[kind].name)):
      raise InputError(f"{self.path}: {name} has type {kind}, which the gguf package cannot read")
    return known[kind]


def _shortest_decimal(x: float) -> float:
  """Returns a float32 of the metadata as the shortest decimal that gives the same float32."""
  return float(str(np.float32(x)))
