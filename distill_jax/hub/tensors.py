"""The tensors of a Hugging Face checkpoint that is written, from memory or from a run's checkpoint.

A tensor is computed in parts: in the layout of the file and in its order, so that one part after
the other is written. From memory it has one part, the tensor. From a checkpoint a part has at most
PART_BYTES, read by slices, so that no process holds a model, nor one of its embeddings.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import jax
import numpy as np
from flax import nnx

from distill_jax.errors import InputError
from distill_jax.hub import declared
from distill_jax.nn import params
from distill_jax.runtime import distributed
from distill_jax.runtime.saved_arrays import SavedArrays, Sums
from distill_jax.types import JsonObject, PyTree

CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
PART_BYTES = 64 * 2**20
AHEAD = 3  # parts that are being read while one is written
Finish = Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of the checkpoint, with the parameter that contains its value.

  Attributes:
    name: its name in the checkpoint.
    path: the dotted path of the parameter.
    param: the parameter, or its shape.
    loop_index: the index along the loop axes of the parameter.
    layout: the layouts of the parameter and of the tensor.
    dtype: its dtype in the checkpoint.
  """

  name: str
  path: str
  param: nnx.Variable
  loop_index: tuple[int, ...]
  layout: declared.Layout
  dtype: np.dtype

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape in the checkpoint."""
    return self.layout.shape

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def to_stored(self, ours: np.ndarray) -> np.ndarray:
    """Returns a part in the layout and dtype of the checkpoint.

    Raises:
      InputError: A value is too large for float16.
    """
    with np.errstate(over="ignore"):  # checked below
      stored = self.layout.to_stored(ours, self.dtype)
    if self.dtype == np.float16 and np.isinf(stored).any() and not np.isinf(ours).any():
      raise InputError(
        f"{self.name} contains {np.abs(ours).max():.3g}, but the maximum of float16 is 65504. Set "
        "export.dtype to 'bfloat16'."
      )
    return stored


class Source(Protocol):
  """The place from which the values of tensors are read.

  Attributes:
    together: whether all processes must read every tensor, in the same order.
  """

  together: bool

  def reads(self, tensor: Tensor, sums: Sums) -> Iterator[Callable[[], Finish]]:
    """Yields for each part a function that starts to read it; see SavedArrays.start_reading."""


class InMemory:
  """The values of a model's parameters, with any sharding."""

  together = True

  def reads(self, tensor: Tensor, sums: Sums) -> Iterator[Callable[[], Finish]]:
    del sums
    # Only this tensor is copied to the host.
    yield lambda: lambda: tensor.to_stored(_to_host(tensor.param[...], tensor.loop_index))


@dataclasses.dataclass(frozen=True)
class InCheckpoint:
  """The values of a run's trained parameters.

  Attributes:
    arrays: the checkpoint.
  """

  arrays: SavedArrays
  together = False

  def reads(self, tensor: Tensor, sums: Sums) -> Iterator[Callable[[], Finish]]:
    loops = tuple(slice(i, i + 1) for i in tensor.loop_index)

    def start(index: tuple[slice, ...]) -> Finish:
      finish = self.arrays.start_reading(tensor.path, loops + index, sums)
      return lambda: tensor.to_stored(finish()[(0,) * len(loops)])

    for index in tensor.layout.row_parts(PART_BYTES // tensor.param.dtype.itemsize):
      yield functools.partial(start, index)


def tensors_of(model: PyTree, dtype: np.dtype) -> list[Tensor]:
  """Returns the tensors of a model's parameters (or their shapes), layer by layer.

  Raises:
    ValueError: Two parameters declare the same name, which is a bug.
  """
  tensors = []
  for path, v in params.named_params(model):
    layout, own = declared.Layout(v), declared.dtype_of(v, dtype)
    tensors += [Tensor(name, path, v, i, layout, own) for name, i in declared.tensors(v)]
  if len({t.name for t in tensors}) < len(tensors):
    raise ValueError("Two parameters declare the same Hugging Face name.")
  return sorted(tensors, key=lambda t: _natural_order(t.name))


def _natural_order(name: str) -> list[int | str]:
  """Returns a sort key with which layer 2 is before layer 10."""
  return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _to_host(x: jax.Array, loop_index: tuple[int, ...]) -> np.ndarray:
  """Returns one tensor of a stack; on a single CPU device it is a view of the array's memory."""
  devices: list[jax.Device] = list(x.sharding.device_set)
  if len(devices) == 1 and devices[0].platform == "cpu":
    return np.asarray(x)[loop_index]
  return distributed.to_host(x[(*loop_index, ...)])


def parts(source: Source, tensors: Iterable[Tensor], sums: Sums) -> Iterator[np.ndarray]:
  """Yields the parts of tensors, in order; the next ones are being read.

  Args:
    source: where the values are.
    tensors: the tensors.
    sums: the checksums of what is read are added.
  """
  started: collections.deque[Finish] = collections.deque()
  for tensor in tensors:
    for start in source.reads(tensor, sums):
      started.append(start())
      if len(started) > AHEAD:
        yield started.popleft()()
  while started:
    yield started.popleft()()


@dataclasses.dataclass(frozen=True)
class Shard:
  """One safetensors file: its name and tensors."""

  name: str
  tensors: tuple[Tensor, ...]

  @functools.cached_property
  def header(self) -> bytes:
    """The bytes before the values of the first tensor."""
    at = 0
    entries: JsonObject = {"__metadata__": {"format": "pt"}}  # transformers needs it
    for t in self.tensors:
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

  @property
  def nbytes(self) -> int:
    """The size of the file."""
    return len(self.header) + sum(t.nbytes for t in self.tensors)
