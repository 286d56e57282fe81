"""Reads GGUF files, the format of llama.cpp: config and weights under Hugging Face names.

The `gguf` package dequantises the blocks. The header is parsed here, because the reader of the
package creates an object for every string (1.8 s for a vocabulary of 49,152) and does not check
lengths. As in llama.cpp, tensors must be adjacent and in the listed order, so that a damaged offset
cannot select the bytes of another tensor.
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
from distill_jax.hub.weights import Index, WeightFile
from distill_jax.runtime import extras, files
from distill_jax.types import JsonObject

with extras.needed("gguf"):
  import gguf
  from gguf import quants

# Struct codes of the value types in the metadata.
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
ROWS = 64  # rows dequantised at a time, so that temporary arrays fit the cache


class GGUFTensor(NamedTuple):
  """The type, shape and position of a tensor in the file."""

  kind: gguf.GGMLQuantizationType
  shape: tuple[int, ...]  # in numpy's order, slowest axis first
  begin: int
  end: int
  heads: int  # heads of a matrix whose rows llama.cpp has permuted; 0: not permuted


class GGUFFile:
  """A reader of the tensors in a GGUF file, or slices of them, dequantised to float32.

  Attributes:
    path: the file.
    files: the file as a tuple (see Weights).
    meta: the metadata of the file.

  Raises:
    InputError: The file is truncated or damaged, or its architecture is not supported.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    cursor = _Cursor(path)
    count, keys = cursor.start()
    self.meta = cursor.metadata(keys)
    if (arch := self.meta.get("general.architecture")) != "llama":
      raise InputError(
        f"{path} has architecture {arch!r}, but only GGUF files with architecture 'llama' can be "
        "read. Use the safetensors folder of this model."
      )
    self._entries = self._named(cursor.tensors(count, self.meta.get("general.alignment", 32)))
    self._map = np.frombuffer(cursor.data, np.uint8)
    info = files.FileInfo(cursor.size, str(path.stat().st_mtime_ns))
    self.files: tuple[WeightFile, ...] = (WeightFile(str(path), info, ""),)

  def number(self, key: str, default: Any = None, kind: type[int] | type[float] = int) -> Any:
    """Returns the number `llama.{key}` of the metadata.

    Raises:
      InputError: It is missing or is not a positive number of this type.
    """
    value: Any = self.meta.get(f"llama.{key}", default)
    if type(value) is not kind or not 0 < value < 2**40:
      raise InputError(
        f"{self.path}: llama.{key} is {value!r:.60}; expected a positive {kind.__name__}. Download "
        "the file again, or use the safetensors folder."
      )
    return value

  def _named(self, entries: dict[str, GGUFTensor]) -> dict[str, GGUFTensor]:
    """Returns the tensors under Hugging Face names.

    A tensor that has none keeps its name, for which load_model then raises an error.
    """
    heads = self.number("attention.head_count")
    permuted = {"attn_q": heads, "attn_k": self.number("attention.head_count_kv", heads)}
    named = {}
    for name, e in entries.items():
      if m := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name):
        hf = f"model.layers.{m[1]}.{IN_LAYER[m[2]]}.weight" if m[2] in IN_LAYER else name
        e = e._replace(heads=permuted.get(m[2], 0))
        if e.heads and e.shape[0] % (2 * e.heads):
          raise InputError(
            f"{self.path}: {name} has {e.shape[0]} rows; expected an even number for each of "
            f"{e.heads} heads. Download the file again."
          )
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
    """Returns the tensor, or the slice at `index`, in float32; only its rows are dequantised."""
    e = self._entries[name]
    index = index or (slice(None),) * len(e.shape)
    raw = self._map[e.begin : e.end]
    if len(e.shape) == 1:
      return _dequantise(raw[None], e.kind)[0][index]
    raw = raw.reshape(math.prod(e.shape[:-1]), -1)
    if len(e.shape) > 2:
      return _dequantise(raw, e.kind).reshape(e.shape)[index]
    if e.heads:
      # llama.cpp interleaves rows i and i + h/2 of each head; restore the order of Hugging Face.
      rows = np.arange(e.shape[0]).reshape(e.heads, -1, 2).swapaxes(1, 2).reshape(-1)
      raw = raw[rows[index[0]]]
    else:
      raw = raw[index[0]]
    return _dequantise(raw, e.kind)[:, index[1]]

  def config(self) -> JsonObject:
    """Returns the content of the Hugging Face config.json for this model."""
    get = self.number
    for key in ("rope.scaling.type", "expert_count"):
      if self.meta.get(f"llama.{key}", 0) not in (0, "none"):
        raise InputError(
          f"{self.path} has llama.{key}, which is not supported for GGUF files. Use the "
          "safetensors folder of this model."
        )
    if "rope_freqs.weight" in self._entries:
      raise InputError(
        f"{self.path} has a table rope_freqs.weight (the rope scaling of Llama 3.1), which is not "
        "supported for GGUF files. Use the safetensors folder of this model."
      )
    heads, width = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", get("rope.dimension_count", width // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
      if get(key, head_dim) != head_dim:
        raise InputError(
          f"{self.path}: llama.{key} is {get(key)}; expected {head_dim}, the width of a head. Use "
          "the safetensors folder of this model."
        )
    embed = self._entries.get("model.embed_tokens.weight")
    if embed is None:
      raise InputError(
        f"{self.path} has no token_embd.weight, so it is not a language model. Choose another file."
      )
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
      # llama.cpp writes the output projection only if it differs from the embedding table.
      "tie_word_embeddings": "lm_head.weight" not in self._entries,
      **{k: v for k, v in ids.items() if v is not None},
    }


def _dequantise(raw: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
  """Converts rows of blocks (uint8 [n, bytes]) to float32 [n, width]."""
  if kind == gguf.GGMLQuantizationType.F32:
    return raw.view(np.float32)
  if kind == gguf.GGMLQuantizationType.F16:
    return raw.view(np.float16).astype(np.float32)
  format_ = getattr(quants, kind.name)
  format_.init_grid()
  block, size = gguf.GGML_QUANT_SIZES[kind]
  out = np.empty((len(raw), raw.shape[1] // size * block), np.float32)
  # A damaged scale can be NaN. The NaN is kept, and the first loss stops the run.
  with np.errstate(invalid="ignore", over="ignore"):
    for i in range(0, len(raw), ROWS):
      out[i : i + ROWS] = format_.dequantize_rows(raw[i : i + ROWS])
  return out


class _Cursor:
  """A parser of the header, which checks every read against the size of the file."""

  def __init__(self, path: pathlib.Path):
    self.path, self.at = path, 0
    with path.open("rb") as f:
      self.size = path.stat().st_size
      if self.size < 24:
        raise InputError(
          f"{path} has {self.size} bytes, too few for a GGUF file. Download it again."
        )
      self.data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)

  def damaged(self, fault: str) -> InputError:
    return InputError(f"{self.path} is truncated or damaged: {fault}. Download the file again.")

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
      raise self.damaged(f"the value at byte {self.at} has the unknown type {kind}")
    inner, n = self.scalar("I"), self.scalar("Q")
    if inner in SCALARS:
      return np.frombuffer(self.take(n * struct.calcsize(SCALARS[inner])), SCALARS[inner]).tolist()
    if inner != STRING or n > (self.size - self.at) // 8:
      raise self.damaged(f"the array at byte {self.at} has {n} values of type {inner}")
    return [self.string() for _ in range(n)]

  def start(self) -> tuple[int, int]:
    """Returns (number of tensors, number of metadata keys)."""
    magic, version = self.take(4), self.scalar("I")
    if magic != b"GGUF" or version not in (2, 3):
      raise InputError(
        f"{self.path} starts with {magic!r}, version {version}; expected b'GGUF', version 2 or 3. "
        "Choose another file."
      )
    return self.scalar("Q"), self.scalar("Q")

  def metadata(self, n: int) -> JsonObject:
    meta: JsonObject = {}
    for _ in range(n):
      key = self.string()
      if key in meta:
        raise self.damaged(f"it has the key {key!r} twice")
      meta[key] = self.value(self.scalar("I"))
    return meta

  def tensors(self, n: int, align: object) -> dict[str, GGUFTensor]:
    """Parses the table of tensors and checks that they fill the rest of the file."""
    if type(align) is not int or not 0 < align <= 2**16 or align & (align - 1):
      raise self.damaged(f"its alignment is {align!r:.60}, which is not a power of two")
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
        raise self.damaged(f"it has the tensor {name} twice")
      type_ = self._kind(name, kind)
      block, size = gguf.GGML_QUANT_SIZES[type_]
      if not shape or shape[-1] % block:
        raise self.damaged(f"{name} has shape {shape}, which blocks of {block} do not divide")
      end = at + math.prod(shape) // block * size
      if start + offset != at or end > self.size:
        raise self.damaged(
          f"{name} with shape {shape} starts at byte {start + offset} instead of {at}, or ends at "
          f"{end} of {self.size}"
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
      raise InputError(
        f"{self.path}: {name} has type {kind}, which the gguf package cannot read. Use a file with "
        "another quantisation."
      )
    return known[kind]


def _shortest_decimal(x: float) -> float:
  """Returns the shortest decimal that is rounded to the same float32."""
  return float(str(np.float32(x)))
