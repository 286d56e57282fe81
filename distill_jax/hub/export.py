"""A model out to a Hugging Face folder, by the parameters' own declarations."""

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

from distill_jax.errors import InputError
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
  """Where one tensor of the checkpoint comes from."""

  name: str
  param: nnx.Variable
  loop_index: tuple[int, ...]  # along the parameter's loop axes
  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def value(self) -> np.ndarray:
    """Returns the tensor as it is stored, on the host."""
    # One tensor comes to the host, whatever the sharding of the stack it is cut from.
    ours = _to_host(self.param[...], self.loop_index)
    with np.errstate(over="ignore"):  # looked for below
      stored = declared.Layout(self.param).to_stored(ours, self.dtype)
    if self.dtype == np.float16 and np.isinf(stored).any() and not np.isinf(ours).any():
      raise InputError(
        f"{self.name} holds {np.abs(ours).max():.3g}, past float16's 65504; export as bfloat16"
      )
    return stored


def _to_host(x: jax.Array, loop_index: tuple[int, ...]) -> np.ndarray:
  """Returns one tensor of a stack; on a CPU alone it is a view of the array's memory."""
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
  """Writes a folder that `transformers.AutoModelForCausalLM.from_pretrained` takes as it is.

  It is written beside the target under another name, synced to disk and renamed: the
  target is there whole or not at all. Host memory holds one tensor at a time.

  Args:
    model: a family's Model; its `config` becomes config.json.
    target: the folder to make; it must not exist.
    tokenizer: written as it was read (`Pretrained.tokenizer`); None writes none.
    generation: becomes generation_config.json; its token ids go into config.json too.
    card: README.md, Markdown.
    extra: more JSON files by name; what is given for config.json goes into it.
    dtype: of the tensors: "float32", "bfloat16" or "float16".
    shard_bytes: the largest a safetensors file may be, unless one tensor is larger.

  Raises:
    InputError: the target exists, the disk is too full, the dtype cannot hold a value.
  """
  if shard_bytes < 1:
    raise InputError(f"shard_bytes is {shard_bytes}; it is a positive number of bytes")
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
  """A folder to write into, synced and renamed to the target if nothing is raised.

  The first process of a run writes; it is None on the others, which have then given it the
  parts of the tensors that they hold.

  Raises:
    InputError: the target exists, or the disk has no room for the tensors.
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
    shutil.rmtree(work, ignore_errors=True)  # gone already, if all went well
  distributed.barrier(f"exported {target}")


def check_new(target: str | os.PathLike[str]) -> None:
  if pathlib.Path(target).exists():
    raise InputError(f"{target} exists, and export overwrites nothing; name a folder that does not")


def _check_room(target: pathlib.Path, need: int) -> None:
  check_new(target)
  target.parent.mkdir(parents=True, exist_ok=True)
  if (free := shutil.disk_usage(target.parent).free) < need:
    raise InputError(f"{target} needs {need} bytes and the disk has {free}; make room")


def tensor_sources(model: PyTree, dtype: np.dtype) -> list[TensorSource]:
  """Returns the checkpoint's tensors, layer by layer.

  Raises:
    ValueError: two parameters declare one name, which is a bug.
  """
  sources = [
    TensorSource(name, v, loop_index, declared.Layout(v).shape, declared.dtype_of(v, dtype))
    for _, v in params.named_params(model)
    for name, loop_index in declared.tensors(v)
  ]
  if len({s.name for s in sources}) < len(sources):
    raise ValueError("two parameters declare the same Hugging Face name")
  return sorted(sources, key=lambda source: _natural_order(source.name))


def _natural_order(name: str) -> list[int | str]:
  """A key that sorts layer 2 before layer 10."""
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
  """One safetensors file, a tensor at a time, on disk when this returns."""
  at = 0
  header: JsonObject = {"__metadata__": {"format": "pt"}}  # transformers asks for it
  for s in shard:
    end, code = at + s.nbytes, CODES[s.dtype.name]
    header[s.name] = {"dtype": code, "shape": list(s.shape), "data_offsets": [at, end]}
    at = end
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
  f.write(len(text).to_bytes(8, "little") + text)
  with ThreadPoolExecutor(1) as background:  # one tensor is written while the next is made
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
  # transformers 5 reads `dtype`, older ones and vLLM `torch_dtype`.
  write_hf_json(folder / "config.json", {**hf, "dtype": dtype, "torch_dtype": dtype, **ids})
  if generation:
    write_hf_json(folder / "generation_config.json", generation)
  write_tokenizer(folder, tokenizer, card)


def write_tokenizer(folder: pathlib.Path, tokenizer: TokenizerFiles | None, card: str) -> None:
  """The tokenizer's files, if there are any, and the model card."""
  atomic_write(folder / "README.md", card.encode())
  if tokenizer is not None:
    write_hf_json(folder / "tokenizer_config.json", tokenizer.config)
    if tokenizer.json is not None:
      atomic_write(folder / "tokenizer.json", tokenizer.json.encode())
    if tokenizer.sentencepiece is not None:
      atomic_write(folder / "tokenizer.model", tokenizer.sentencepiece)
