"""Writes a model as a Hugging Face folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

import jax
import numpy as np
from flax import nnx

from distill_jax.errors import InputError, bad_value
from distill_jax.hub import declared
from distill_jax.hub.safetensors_folder import INDEX, SINGLE
from distill_jax.hub.tokenizer import TokenizerFiles
from distill_jax.hub.weights import float_dtype, write_hf_json
from distill_jax.nn import params
from distill_jax.runtime import distributed
from distill_jax.runtime.atomic_io import atomic_write, fsync_dir
from distill_jax.types import JsonObject, Model, PyTree

CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class TensorSource:
  """A tensor of the checkpoint, with the parameter that contains its value."""

  name: str
  param: nnx.Variable
  loop_index: tuple[int, ...]  # index along the loop axes of the parameter
  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def value(self) -> np.ndarray:
    """Returns the tensor on the host, in the layout of the checkpoint."""
    # Only this tensor is copied to the host, with any sharding of the stacked parameter.
    ours = _to_host(self.param[...], self.loop_index)
    with np.errstate(over="ignore"):  # checked below
      stored = declared.Layout(self.param).to_stored(ours, self.dtype)
    if self.dtype == np.float16 and np.isinf(stored).any() and not np.isinf(ours).any():
      raise InputError(
        f"{self.name} contains {np.abs(ours).max():.3g}, but the maximum of float16 is 65504. Set "
        "export.dtype to 'bfloat16'."
      )
    return stored


def _to_host(x: jax.Array, loop_index: tuple[int, ...]) -> np.ndarray:
  """Returns one tensor of a stack; on a single CPU device it is a view of the array's memory."""
  devices: list[jax.Device] = list(x.sharding.device_set)
  if len(devices) == 1 and devices[0].platform == "cpu":
    return np.asarray(x)[loop_index]
  return distributed.to_host(x[(*loop_index, ...)])


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
) -> pathlib.Path:
  """Writes a folder that `transformers.AutoModelForCausalLM.from_pretrained` can load.

  The folder is written under a temporary name in the same parent folder, synced to disk and
  renamed, so that the target appears only when it is complete. One tensor at a time is on the host.

  Args:
    model: a family's Model; its `config` is written to config.json.
    target: the folder to write; it must not exist.
    tokenizer: the files of the tokenizer (`Pretrained.tokenizer`); None: no tokenizer.
    generation: the content of generation_config.json; its token ids are also in config.json.
    card: the model card in Markdown, for README.md.
    extra: additional JSON files by name; the entry for config.json is merged into it.
    dtype: the dtype of the tensors: "float32", "bfloat16" or "float16".
    shard_bytes: the maximum size of a safetensors file, unless a single tensor is larger.

  Returns:
    The absolute path of the folder.

  Raises:
    InputError: The target exists, the disk is full, or a value is too large for the dtype.
  """
  if shard_bytes < 1:
    expected = "a positive number of bytes"
    raise bad_value("export.shard_bytes", shard_bytes, expected, "Correct it")
  tensors = tensor_sources(model, float_dtype(dtype))
  with new_folder(target, tensors) as work:
    if work is not None:
      _write_weights(work, tensors, shard_bytes)
      files = dict(extra or {})
      hf = model.config.to_hf() | files.pop("config.json", {})
      _write_texts(work, hf, dtype, tokenizer, generation, card)
      for name, value in files.items():
        (work / name).parent.mkdir(exist_ok=True)
        write_hf_json(work / name, value)
  return pathlib.Path(target).absolute()


@contextlib.contextmanager
def new_folder(
  target: str | os.PathLike[str], tensors: list[TensorSource]
) -> Iterator[pathlib.Path | None]:
  """A context manager that yields a folder to write into and renames it to the target at the end.

  If an error is raised, the folder is deleted. Only the first process of a run writes. The others
  send it their parts of the tensors, and get None.

  Raises:
    InputError: The target exists, or the disk is too small for the tensors.
  """
  target = pathlib.Path(target).absolute()
  distributed.run_on_process_0(lambda: _check_room(target, sum(s.nbytes for s in tensors)))
  if not distributed.is_process_0():
    for s in tensors:
      s.value()
    yield None
    distributed.barrier(f"exported {target}")
    return
  work = target.parent / f".{target.name}.{os.getpid()}.tmp"
  work.mkdir()
  try:
    yield work
    fsync_dir(work)
    work.rename(target)
    fsync_dir(target.parent)
  finally:
    shutil.rmtree(work, ignore_errors=True)  # only exists after an error
  distributed.barrier(f"exported {target}")


def check_new(target: str | os.PathLike[str]) -> None:
  """Raises InputError if the folder to export to exists."""
  if pathlib.Path(target).exists():
    raise InputError(f"{target} exists, and export does not overwrite. Choose another export.dir.")


def _check_room(target: pathlib.Path, need: int) -> None:
  check_new(target)
  target.parent.mkdir(parents=True, exist_ok=True)
  if (free := shutil.disk_usage(target.parent).free) < need:
    raise InputError(
      f"{target} needs {need:,} bytes, but the disk has only {free:,} bytes free. Free some space."
    )


def tensor_sources(model: PyTree, dtype: np.dtype) -> list[TensorSource]:
  """Returns the tensors of the checkpoint, layer by layer.

  Raises:
    ValueError: Two parameters declare the same name, which is a bug.
  """
  sources = [
    TensorSource(name, v, loop_index, declared.Layout(v).shape, declared.dtype_of(v, dtype))
    for _, v in params.named_params(model)
    for name, loop_index in declared.tensors(v)
  ]
  if len({s.name for s in sources}) < len(sources):
    raise ValueError("Two parameters declare the same Hugging Face name.")
  return sorted(sources, key=lambda source: _natural_order(source.name))


def _natural_order(name: str) -> list[int | str]:
  """Returns a sort key with which layer 2 is before layer 10."""
  return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _shards(sources: list[TensorSource], limit: int) -> Iterator[list[TensorSource]]:
  shard: list[TensorSource] = []
  size = 0
  for s in sources:
    if shard and size + s.nbytes > limit:
      yield shard
      shard, size = [], 0
    shard.append(s)
    size += s.nbytes
  yield shard


def _write_weights(folder: pathlib.Path, sources: list[TensorSource], limit: int) -> None:
  shards = list(_shards(sources, limit))
  where: dict[str, str] = {}
  for i, shard in enumerate(shards, 1):
    name = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
    where |= {s.name: name for s in shard}
    with (folder / name).open("wb") as f:
      write_shard(f, shard)
  if len(shards) > 1:
    total = sum(math.prod(s.shape) for s in sources)
    meta = {"total_parameters": total, "total_size": sum(s.nbytes for s in sources)}
    write_hf_json(folder / INDEX, {"metadata": meta, "weight_map": where})


def write_shard(f: BinaryIO, shard: list[TensorSource]) -> None:
  """Writes a safetensors file, one tensor at a time, and syncs it to disk."""
  at = 0
  header: JsonObject = {"__metadata__": {"format": "pt"}}  # transformers needs it
  for s in shard:
    end, code = at + s.nbytes, CODES[s.dtype.name]
    header[s.name] = {"dtype": code, "shape": list(s.shape), "data_offsets": [at, end]}
    at = end
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8
  f.write(len(text).to_bytes(8, "little") + text)
  with ThreadPoolExecutor(1) as background:  # writes one tensor while the next is computed
    writing: Future | None = None
    for s in shard:
      data = s.value().reshape(-1).view(np.uint8).data
      if writing is not None:
        writing.result()
      writing = background.submit(f.write, data)
    if writing is not None:
      writing.result()
  f.flush()
  os.fsync(f.fileno())


def _write_texts(
  folder: pathlib.Path,
  hf: JsonObject,
  dtype: str,
  tokenizer: TokenizerFiles | None,
  generation: JsonObject,
  card: str,
) -> None:
  ids = {k: v for k, v in generation.items() if k.endswith("_token_id")}
  # transformers 5 reads `dtype`; older versions and vLLM read `torch_dtype`.
  write_hf_json(folder / "config.json", {**hf, "dtype": dtype, "torch_dtype": dtype, **ids})
  if generation:
    write_hf_json(folder / "generation_config.json", generation)
  write_tokenizer(folder, tokenizer, card)


def write_tokenizer(folder: pathlib.Path, tokenizer: TokenizerFiles | None, card: str) -> None:
  """Writes the model card and, if there is a tokenizer, its files."""
  atomic_write(folder / "README.md", card.encode())
  if tokenizer is not None:
    write_hf_json(folder / "tokenizer_config.json", tokenizer.config)
    if tokenizer.json is not None:
      atomic_write(folder / "tokenizer.json", tokenizer.json.encode())
    if tokenizer.sentencepiece is not None:
      atomic_write(folder / "tokenizer.model", tokenizer.sentencepiece)
