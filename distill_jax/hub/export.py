"""Writes a model as a Hugging Face folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence

from distill_jax.errors import bad_value
from distill_jax.hub import export_folder, packed_export, rounding
from distill_jax.hub.export_folder import Content
from distill_jax.hub.safetensors_folder import INDEX, SINGLE
from distill_jax.hub.tensors import (
  Constant,
  Encoded,
  InCheckpoint,
  InMemory,
  Shard,
  Tensor,
  in_files,
  tensors_of,
)
from distill_jax.hub.tokenizer import TokenizerFiles
from distill_jax.hub.weights import float_dtype, hf_json
from distill_jax.nn import params
from distill_jax.nn.quantise import UNROUNDED, QuantiseOptions
from distill_jax.runtime.saved_arrays import SavedArrays
from distill_jax.types import JsonObject, Model

SHARD_BYTES = 5 * 10**9
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8", "int32": "I32"}
CODES |= {"int64": "I64"}
Typed = Tensor | Encoded | Constant


def export_model(
  model: Model,
  target: str | os.PathLike[str],
  *,
  tokenizer: TokenizerFiles | None,
  generation: JsonObject,
  card: str,
  dtype: str = "bfloat16",
  extra: Mapping[str, JsonObject] | None = None,
  shard_bytes: int = SHARD_BYTES,
  saved: SavedArrays | None = None,
  quantise: QuantiseOptions = UNROUNDED,
  integers: QuantiseOptions = UNROUNDED,
) -> None:
  """Writes a folder that `transformers.AutoModelForCausalLM.from_pretrained` can load.

  See export_folder.py for what an interruption leaves. With `saved`, each process reads the
  tensors of its shards by slices from the checkpoint and holds a few parts of 64 MB; no model is
  in memory. Without it, the host has one tensor of the model at a time and a few parts of 4 MB.

  Args:
    model: a family's Model, or its shapes with `saved`; its `config` is written to config.json.
    target: the folder or URL to write; it must not exist.
    tokenizer: the files of the tokenizer (`Pretrained.tokenizer`); None: no tokenizer.
    generation: the content of generation_config.json; its token ids are also in config.json.
    card: the model card in Markdown, for README.md.
    extra: additional JSON files by name; the entry for config.json is merged into it.
    dtype: the dtype of the tensors: "float32", "bfloat16" or "float16".
    shard_bytes: the maximum size of a safetensors file, unless a single tensor is larger.
    saved: the checkpoint that has the values of the parameters; None: `model` has them.
    quantise: the grid on which the linear weights of layers were trained, if any.
    integers: "int8" or "int4" to store these weights as integers, by compressed-tensors.

  Raises:
    InputError: The target exists, the grid does not fit the model, the disk is full, a value is
      too large for the dtype, or the checkpoint is damaged or of another model.
    Unavailable: The store does not answer.
  """
  if shard_bytes < 1:
    expected = "a positive number of bytes"
    raise bad_value("export.shard_bytes", shard_bytes, expected, "Correct it")
  number_type, quantization = float_dtype(dtype), {}
  of_model = tensors_of(model, number_type)
  tensors: Iterable[Typed] = (rounding.trained_tensor(t, quantise) for t in of_model)
  if integers.grid:
    scheme = packed_export.scheme_of(model, integers)
    tensors = packed_export.file_tensors(of_model, scheme, quantise, number_type)
    quantization["quantization_config"] = packed_export.quantization_config(model, scheme)
  shards, index = safetensors_shards(tensors, shard_bytes)
  others = dict(extra or {})
  ids = {k: v for k, v in generation.items() if k.endswith("_token_id")}
  # transformers 5 reads `dtype`; older versions and vLLM read `torch_dtype`.
  hf = {**model.config.to_hf(), **others.pop("config.json", {}), "dtype": dtype}
  hf |= {"torch_dtype": dtype, **ids, **quantization}
  texts = {name: hf_json(value) for name, value in others.items()}
  if generation:
    texts["generation_config.json"] = hf_json(generation)
  texts |= tokenizer_files(tokenizer, card)
  if len(shards) > 1:
    texts[INDEX] = hf_json(index)
  texts["config.json"] = hf_json(hf)
  export_folder.write(target, content_of(model, shards, texts, saved))


def content_of(
  model: Model, shards: Sequence[Shard], texts: Mapping[str, bytes], saved: SavedArrays | None
) -> Content:
  """Returns the files of an export, with the source of the values.

  Args:
    model: the model, or its shapes with `saved`.
    shards: the files of tensors.
    texts: the other files, by name.
    saved: the checkpoint that has the values of the parameters; None: `model` has them.

  Raises:
    InputError: the checkpoint is of another model.
  """
  if saved is None:
    return Content(shards, InMemory(), texts)
  saved.check_same_model(dict(params.named_params(model)))
  return Content(shards, InCheckpoint(saved), texts, saved.digest, saved.check)


def safetensors_shards(tensors: Iterable[Typed], limit: int) -> tuple[list[Shard], JsonObject]:
  """Divides tensors among safetensors files.

  Args:
    tensors: the tensors, in the order of the files.
    limit: the maximum size of the tensors of a file, unless one is larger.

  Returns:
    (the files, the contents of their index).
  """
  groups = in_files(tensors, limit)
  name = f"model-{{:05d}}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else SINGLE
  shards = [
    Shard(name.format(i), tuple(group), safetensors_header(group))
    for i, group in enumerate(groups, 1)
  ]
  every = [t for group in groups for t in group]
  meta = {
    "total_parameters": sum(map(_parameters, every)),
    "total_size": sum(t.nbytes for t in every),
  }
  return shards, {
    "metadata": meta,
    "weight_map": {t.name: s.name for s in shards for t in s.tensors},
  }


def _parameters(tensor: Typed) -> int:
  """Returns the number of parameters that a tensor of a file stands for."""
  if isinstance(tensor, Tensor):
    return math.prod(tensor.shape)
  return math.prod(tensor.tensor.shape) if isinstance(tensor, Encoded) and not tensor.readers else 0


def safetensors_header(tensors: Iterable[Typed]) -> bytes:
  """Returns the bytes of a safetensors file before the values of the first tensor."""
  at = 0
  entries: JsonObject = {"__metadata__": {"format": "pt"}}  # transformers needs it
  for t in tensors:
    end = at + t.nbytes
    entries[t.name] = {
      "dtype": CODES[t.dtype.name],
      "shape": list(t.shape),
      "data_offsets": [at, end],
    }
    at = end
  text = json.dumps(entries, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8
  return len(text).to_bytes(8, "little") + text


def tokenizer_files(tokenizer: TokenizerFiles | None, card: str) -> dict[str, bytes]:
  """Returns the model card and, if there is a tokenizer, its files, by name."""
  texts = {"README.md": card.encode()}
  if tokenizer is not None:
    texts["tokenizer_config.json"] = hf_json(tokenizer.config)
    if tokenizer.json is not None:
      texts["tokenizer.json"] = tokenizer.json.encode()
    if tokenizer.sentencepiece is not None:
      texts["tokenizer.model"] = tokenizer.sentencepiece
  return texts
