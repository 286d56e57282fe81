"""Reads GGUF files, the format of llama.cpp: config and weights under Hugging Face names.

The `gguf` package dequantises the blocks. Of other programs' files, those of the architecture
"llama" can be read. A file that this project wrote has its config.json in the metadata, so that all
architectures are read, with the config to the last field.
"""

from __future__ import annotations

import functools
import math
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from distill_jax.errors import InputError
from distill_jax.hub.gguf_architectures import Architecture, architecture
from distill_jax.hub.gguf_header import Cursor, Stored
from distill_jax.hub.weights import Index, WeightFile, parse_hf_json
from distill_jax.runtime import extras, files
from distill_jax.types import JsonObject

with extras.needed("gguf"):
  import gguf
  from gguf import quants

CONFIG = "distill_jax.config"  # key of config.json in the metadata
# The tensors of all families, without "model.layers.N.", as a checkpoint has them.
IN_LAYER = (
  "input_layernorm.weight",
  "post_attention_layernorm.weight",
  "pre_feedforward_layernorm.weight",
  "post_feedforward_layernorm.weight",
  *(f"self_attn.{x}_proj.weight" for x in ("q", "k", "v", "o", "q_a", "q_b", "k_b", "v_b")),
  *(f"self_attn.{x}_proj.bias" for x in "qkv"),
  *(f"self_attn.{x}norm.weight" for x in ("q_", "k_", "q_a_layer", "kv_a_layer")),
  "self_attn.kv_a_proj_with_mqa.weight",
  *(f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
  *(f"mlp.experts.{x}_proj.weight" for x in ("gate", "up", "down")),
  *(f"mlp.shared_experts.{x}_proj.weight" for x in ("gate", "up", "down")),
  "mlp.gate.weight",
  "mlp.gate.e_score_correction.bias",
)
OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
ROWS = 64  # rows dequantised at a time, so that temporary arrays fit the cache


class Source(NamedTuple):
  """The origin of a tensor of the checkpoint in the file.

  Attributes:
    stored: the tensor of the file.
    shape: its shape in the checkpoint.
    heads: the number of heads whose rows llama.cpp has permuted; 0: not permuted.
    factor: the number by which the scale of a norm is divided.
    offset: the number that is subtracted from it afterwards.
    values: the tensor of the values of latent heads, if `stored` has their keys.
  """

  stored: Stored
  shape: tuple[int, ...]
  heads: int = 0
  factor: float = 1.0
  offset: float = 0.0
  values: Stored | None = None


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
    cursor = Cursor(path)
    count, keys = cursor.start()
    self.meta = cursor.metadata(keys)
    if self.meta.get("split.count", 1) != 1:
      raise InputError(
        f"{path} is one of several files of a model, which cannot be read. Use its safetensors "
        "folder."
      )
    self._architecture = self._known()
    entries = cursor.tensors(count, self.meta.get("general.alignment", 32))
    self._map = np.frombuffer(cursor.data, np.uint8)
    self._sources = self._named(entries)
    info = files.FileInfo(cursor.size, str(path.stat().st_mtime_ns))
    self.files: tuple[WeightFile, ...] = (WeightFile(str(path), info, ""),)

  def _known(self) -> Architecture:
    """Returns the architecture; raises InputError if such files cannot be read."""
    name = self.meta.get("general.architecture")
    if (own := self._own_config()) is not None:
      try:
        found = architecture(own)
      except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
        raise self._damaged(f"{CONFIG} in its metadata cannot be used: {e!r:.200}") from e
      if found.name != name:
        raise self._damaged(f"{CONFIG} in its metadata is that of another architecture")
      for key, value in found.metadata.items():
        stored = self.meta.get(f"{name}.{key}")
        if stored != (float(np.float32(value)) if isinstance(value, float) else value):
          raise self._damaged(f"{name}.{key} is {stored!r:.60}, but {CONFIG} says {value!r:.60}")
      return found
    if name != "llama":
      raise InputError(
        f"{self.path} has architecture {name!r}, but of other programs' GGUF files only those with "
        "architecture 'llama' can be read. Use the safetensors folder of this model."
      )
    return Architecture("llama", {}, interleaved=True)

  def _damaged(self, fault: str) -> InputError:
    return InputError(f"{self.path} is damaged: {fault}. Export or download it again.")

  def _own_config(self) -> JsonObject | None:
    """Returns the config.json in a file that this project wrote."""
    text = self.meta.get(CONFIG)
    return parse_hf_json(text, f"{self.path}: {CONFIG}") if isinstance(text, str) else None

  def number(self, key: str, default: Any = None, kind: type[int] | type[float] = int) -> Any:
    """Returns the number `llama.{key}` of the metadata, or that of another architecture.

    Raises:
      InputError: It is missing or is not a positive number of this type.
    """
    key = f"{self._architecture.name}.{key}"
    value: Any = self.meta.get(key, default)
    if type(value) is not kind or not 0 < value < 2**40:
      raise InputError(
        f"{self.path}: {key} is {value!r:.60}; expected a positive {kind.__name__}. Download "
        "the file again, or use the safetensors folder."
      )
    return value

  def _named(self, entries: dict[str, Stored]) -> dict[str, Source]:
    """Returns the tensors under Hugging Face names.

    A tensor that has none keeps its name, for which load_model then raises an error.
    """
    templates = _templates(self._architecture.name)
    named = {}
    for name, e in entries.items():
      layer, inner = re.fullmatch(r"(?:blk\.(\d+)\.)?(.*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
      known = templates.get((layer is not None, inner))
      if name == "rope_freqs.weight" and self._own_config() is not None:
        continue  # computed from the config
      if known is None:
        named[name] = Source(e, e.shape)
      elif layer is None:
        named[known] = self._source(name, inner, e)
      elif "mlp.experts." in known:
        if len(e.shape) != 3 or 0 in e.shape:
          raise self._damaged(f"{name} has the shape {e.shape}")
        named |= _experts(f"model.layers.{layer}.{known}", e)
      elif "self_attn.k_b_proj" in known:
        named |= self._latent_heads(layer, e, entries)
      elif "self_attn.v_b_proj" not in known:
        hf = known.replace("e_score_correction.bias", "e_score_correction_bias")
        named[f"model.layers.{layer}.{hf}"] = self._source(name, inner, e)
    return named

  def _source(self, name: str, inner: str, e: Stored) -> Source:
    offset = self._architecture.norm_offset if inner.endswith("norm.weight") else 0.0
    factor = self._architecture.query_factor if inner == "attn_q_norm.weight" else 1.0
    heads = 0
    if self._architecture.interleaved and inner in ("attn_q.weight", "attn_k.weight"):
      heads = self.number("attention.head_count")
      if inner == "attn_k.weight":
        heads = self.number("attention.head_count_kv", heads)
      if e.shape[0] % (2 * heads):
        raise InputError(
          f"{self.path}: {name} has {e.shape[0]} rows; expected an even number for each of "
          f"{heads} heads. Download the file again."
        )
    return Source(e, e.shape, heads, factor, offset)

  def _latent_heads(self, layer: str, keys: Stored, entries: dict[str, Stored]) -> dict:
    """Returns the matrix that expands latents, of which the file has two halves."""
    values = entries.get(f"blk.{layer}.attn_v_b.weight")
    if values is None or len(keys.shape) != 3 or values.shape[::2] != keys.shape[:2]:
      raise self._damaged(f"attn_k_b and attn_v_b of layer {layer} do not fit")
    heads, rank, u = keys.shape
    shape = (heads * (u + values.shape[1]), rank)
    return {f"model.layers.{layer}.self_attn.kv_b_proj.weight": Source(keys, shape, values=values)}

  def names(self) -> set[str]:
    return set(self._sources)

  def shape(self, name: str) -> tuple[int, ...]:
    return self._sources[name].shape

  def dtype(self, name: str) -> np.dtype:
    return np.dtype(np.float32)

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """Returns the tensor, or the slice at `index`, in float32; only its rows are dequantised."""
    source = self._sources[name]
    e = source.stored
    index = index or (slice(None),) * len(source.shape)
    if source.values is not None:
      return self._expanding(e, source.values, index)
    raw = self._map[e.begin : e.end]
    if len(e.shape) == 1:
      x = _dequantise(raw[None], e.kind)[0][index]
      return x / np.float32(source.factor) - np.float32(source.offset)
    raw = raw.reshape(math.prod(e.shape[:-1]), -1)
    if len(e.shape) > 2:
      return _dequantise(raw, e.kind).reshape(e.shape)[index]
    if source.heads:
      # llama.cpp interleaves rows i and i + h/2 of each head; restore the order of Hugging Face.
      rows = np.arange(e.shape[0]).reshape(source.heads, -1, 2).swapaxes(1, 2).reshape(-1)
      raw = raw[rows[index[0]]]
    else:
      raw = raw[index[0]]
    return _dequantise(raw, e.kind)[:, index[1]]

  def _expanding(self, keys: Stored, values: Stored, index: Index) -> np.ndarray:
    """Returns rows of the matrix that expands latents to the keys and values of heads."""
    heads, rank, height = keys.shape[0], keys.shape[1], keys.shape[2] + values.shape[1]
    rows = range(heads * height)[index[0]]
    first, last = rows.start // height, -(-rows.stop // height)  # only their heads are dequantised

    def dequantised(e: Stored) -> np.ndarray:
      raw = self._map[e.begin : e.end].reshape(heads, e.shape[1], -1)[first:last]
      return _dequantise(raw.reshape(-1, raw.shape[2]), e.kind).reshape(-1, *e.shape[1:])

    of_heads = np.concatenate([dequantised(keys).swapaxes(1, 2), dequantised(values)], 1)
    at = rows.start - first * height
    return of_heads.reshape(-1, rank)[at : at + len(rows), index[1]]

  def config(self) -> JsonObject:
    """Returns the content of the Hugging Face config.json for this model."""
    if (own := self._own_config()) is not None:
      return own
    get = self.number
    for key in ("rope.scaling.type", "expert_count"):
      if self.meta.get(f"llama.{key}", 0) not in (0, "none"):
        raise InputError(
          f"{self.path} has llama.{key}, which is not supported for GGUF files. Use the "
          "safetensors folder of this model."
        )
    if "rope_freqs.weight" in self._sources:
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
    embed = self._sources.get("model.embed_tokens.weight")
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
      "tie_word_embeddings": "lm_head.weight" not in self._sources,
      **{k: v for k, v in ids.items() if v is not None},
    }


@functools.cache
def _templates(arch: str) -> dict[tuple[bool, str], str]:
  """Returns Hugging Face's names by (whether in a layer, llama.cpp's name without the layer)."""
  number = next(n for n, known in gguf.MODEL_ARCH_NAMES.items() if known == arch)
  names = gguf.get_tensor_name_map(number, 1)
  found = {}
  for hf in OUTSIDE:
    if name := names.get_name(hf, (".weight",)):
      found[False, name] = hf
  for hf in IN_LAYER:
    if name := names.get_name(f"model.layers.0.{hf}", (".weight", ".bias")):
      found[True, name.removeprefix("blk.0.")] = hf
  return found


def _experts(hf: str, e: Stored) -> dict[str, Source]:
  """Returns the experts of a layer, which the file has as one tensor."""
  size = (e.end - e.begin) // e.shape[0]
  return {
    hf.replace(".experts.", f".experts.{i}."): Source(
      Stored(e.kind, e.shape[1:], e.begin + i * size, e.begin + (i + 1) * size), e.shape[1:]
    )
    for i in range(e.shape[0])
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


def _shortest_decimal(x: float) -> float:
  """Returns the shortest decimal that is rounded to the same float32."""
  return float(str(np.float32(x)))
