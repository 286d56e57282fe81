"""Writes a model as a GGUF file, the format of llama.cpp.

The header (the numbers of the architecture, the vocabulary, the table of tensors) is written by the
`gguf` package, the tensors by export_folder.py: part by part, from memory or from a checkpoint.
Files of more than SPLIT_BYTES are split, as llama.cpp reads them, so that several processes write
a large model and a store accepts it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.errors import InputError, check_choice
from distill_jax.hub import export_folder
from distill_jax.hub.export import content_of
from distill_jax.hub.gguf_architectures import Architecture, architecture
from distill_jax.hub.gguf_file import CONFIG
from distill_jax.hub.gguf_tensors import ALIGNMENT, QUANTS, GGUFTensor, Numbers, gguf_tensors
from distill_jax.hub.gguf_vocabulary import differences, vocabulary
from distill_jax.hub.tensors import Shard, in_files, tensors_of
from distill_jax.hub.tokenizer import TokenizerFiles
from distill_jax.hub.weights import hf_json
from distill_jax.runtime import distributed, extras
from distill_jax.runtime.saved_arrays import SavedArrays
from distill_jax.types import JsonObject, Model

with extras.needed("gguf"):
  import gguf

SPLIT_BYTES = 48 * 10**9  # Hugging Face's hub refuses files of more than 50 GB
Entry = tuple[str, Any]  # key and value of the metadata
Kind = gguf.GGUFValueType
TYPES = {
  bool: Kind.BOOL,
  int: Kind.UINT32,
  float: Kind.FLOAT32,
  str: Kind.STRING,
  list: Kind.ARRAY,
}
KEYS = {  # keys with other types of integers
  "split.no": Kind.UINT16,
  "split.count": Kind.UINT16,
  "split.tensors.count": Kind.INT32,
}


def export_gguf(
  model: Model,
  target: str | os.PathLike[str],
  *,
  tokenizer: TokenizerFiles | None,
  generation: JsonObject,
  card: str,
  numbers: Numbers,
  extra: Mapping[str, JsonObject] | None = None,
  saved: SavedArrays | None = None,
  split_bytes: int = SPLIT_BYTES,
) -> None:
  """Writes a folder with a GGUF file that llama.cpp can load, and a model card.

  What llama.cpp does differently with the tokenizer is printed to stderr.

  See export_folder.py for what an interruption leaves. With `saved`, each part of 64 MB is read
  from the checkpoint, encoded and written; no model is in memory.

  Args:
    model: a family's Model, or its shapes with `saved`.
    target: the folder or URL to write; it must not exist.
    tokenizer: the files of the tokenizer, which become the vocabulary of the file.
    generation: the content of generation_config.json, which has the tokens that end a text.
    card: the model card in Markdown, for README.md.
    numbers: the types of the tensors.
    extra: additional JSON files by name.
    saved: the checkpoint that has the values of the parameters; None: `model` has them.
    split_bytes: the maximum size of a file, unless a single tensor is larger.

  Raises:
    InputError: llama.cpp lacks the family or a part of it, blocks do not divide the width of a
      tensor, a value is too large for its type, there is no tokenizer, or export_folder.write
      raises it.
    Unavailable: The store does not answer.
  """
  shards = gguf_files(model, tokenizer, generation, numbers, split_bytes)
  if tokenizer is not None and distributed.is_process_0():
    for difference in differences(tokenizer):
      print(difference, file=sys.stderr)
  texts = {name: hf_json(value) for name, value in (extra or {}).items()}
  texts["README.md"] = card.encode()
  export_folder.write(target, content_of(model, shards, texts, saved))


def gguf_files(
  model: Model,
  tokenizer: TokenizerFiles | None,
  generation: JsonObject,
  numbers: Numbers,
  split_bytes: int = SPLIT_BYTES,
) -> list[Shard]:
  """Returns the files of a model, with their headers; see export_gguf."""
  if tokenizer is None:
    raise InputError(
      "A GGUF file contains the tokenizer, but this student has none. Set data.tokenizer, or set "
      "export.format to 'hf'."
    )
  arch, tensors = plan(model, numbers)
  hf = model.config.to_hf()
  ids = {k: v for k, v in generation.items() if k.endswith("_token_id")}
  metadata = _metadata(arch, numbers.quant) + vocabulary(tokenizer, hf, generation)
  metadata.append((CONFIG, json.dumps({**hf, **ids})))  # for the reader of this project
  return _shards(tensors, arch.name, metadata, numbers.quant, split_bytes)


def plan(model: Model, numbers: Numbers) -> tuple[Architecture, list[GGUFTensor]]:
  """Returns the architecture and the tensors of a model's GGUF file.

  The size of the file is the sum of their `nbytes` and that of the header; see gguf_files.

  Args:
    model: a family's Model, or its shapes.
    numbers: the types of the tensors.

  Raises:
    InputError: llama.cpp lacks the family or a part of it, or blocks do not divide the width of a
      tensor.
  """
  check_choice("export.quant", numbers.quant, QUANTS, "Choose one of them")
  check_choice("export.embedding", numbers.embedding, QUANTS, "Choose one of them")
  for name, quant in numbers.widths.items():
    check_choice(f"The type of {name}", quant, QUANTS, "Choose one of them")
  arch = architecture(model.config.to_hf())
  tensors = gguf_tensors(tensors_of(model, np.dtype(np.float32)), arch, numbers)
  if unknown := numbers.widths.keys() - {t.name for t in tensors if t.role == "linear"}:
    raise InputError(
      f"The model has no linear weight {min(unknown)}. Choose the types of its tensors again."
    )
  return arch, tensors


def _shards(
  tensors: Sequence[GGUFTensor], arch: str, metadata: Sequence[Entry], quant: str, limit: int
) -> list[Shard]:
  """Returns the files; the first has the metadata."""
  groups = in_files(tensors, limit)
  if len(groups) == 1:
    return [Shard(f"model-{quant}.gguf", tuple(tensors), _header(arch, metadata, tensors))]
  shards = []
  for i, group in enumerate(groups):
    split = [("split.no", i), ("split.count", len(groups)), ("split.tensors.count", len(tensors))]
    header = _header(arch, [*split, *([] if i else metadata)], group)
    name = f"model-{quant}-{i + 1:05d}-of-{len(groups):05d}.gguf"
    shards.append(Shard(name, tuple(group), header))
  return shards


def _metadata(arch: Architecture, quant: str) -> list[Entry]:
  kind = "ALL_F32" if quant == "F32" else f"MOSTLY_{quant}"
  return [
    ("general.type", "model"),
    ("general.file_type", int(gguf.LlamaFileType[kind])),
    ("general.quantization_version", gguf.GGML_QUANT_VERSION),
    *((f"{arch.name}.{key}", value) for key, value in arch.metadata.items()),
  ]


def _header(arch: str, entries: Sequence[Entry], tensors: Sequence[GGUFTensor]) -> bytes:
  """Returns the bytes before the first tensor, which the gguf package writes into a file."""
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "header")
    writer = gguf.GGUFWriter(path, arch)
    for key, value in entries:
      if value == []:  # the package does not write empty arrays
        continue
      writer.add_key_value(key, value, KEYS.get(key, TYPES[type(value)]))
    for t in tensors:
      kind = gguf.GGMLQuantizationType[t.quant]
      writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.values_nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = path.read_bytes()
  return header + bytes(-len(header) % ALIGNMENT)
