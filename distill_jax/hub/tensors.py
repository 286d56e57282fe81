"""The tensors of the files that are written, from memory or from a run's checkpoint.

A tensor is computed in parts: in the layout of the file and in its order, so that one part after
the other is written. From memory a part has about declared.BLOCK elements, which caches hold. From
a checkpoint it has at most PART_BYTES, read by slices, so that no process holds a model, nor one of
its embeddings.

A file consists of FileTensors: of Tensors, which have the values of the parameters, of Encoded
tensors, which are computed from these part by part, and of Constants.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from flax import nnx

from distill_jax.errors import InputError
from distill_jax.hub import declared, table_rows
from distill_jax.nn import params
from distill_jax.runtime import distributed, saved_arrays
from distill_jax.runtime.saved_arrays import SavedArrays, Sums, add
from distill_jax.types import PyTree

VOCABULARY = "vocab"  # the axis of tokens
PART_BYTES = 64 * 2**20
AHEAD = 3  # parts that are being read while one is written
Finish = Callable[[], np.ndarray]


class FileTensor(Protocol):
  """A part of a file, in its layout.

  Attributes:
    name: its name in the file.
    nbytes: its size in the file.
  """

  @property
  def name(self) -> str: ...
  @property
  def nbytes(self) -> int: ...

  def reads(self, source: Source, sums: Sums) -> Iterator[Callable[[], Finish]]:
    """Yields for each part, in order, a function that starts to read what it needs.

    Args:
      source: where the values of the model are.
      sums: the checksums of what is read are added when a part is finished.
    """


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
    rows: its number of rows in the checkpoint if the parameter has another; see table_rows.py.
  """

  name: str
  path: str
  param: nnx.Variable
  loop_index: tuple[int, ...]
  layout: declared.Layout
  dtype: np.dtype
  rows: int | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape in the checkpoint."""
    shape = self.layout.shape
    return shape if self.rows is None else (self.rows, *shape[1:])

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def reads(self, source: Source, sums: Sums) -> Iterator[Callable[[], Finish]]:
    starts = source.reads(self, sums)
    if self.rows is None:
      return starts
    return table_rows.resized(starts, self.layout.shape[0], self.rows)

  def to_stored(self, ours: np.ndarray) -> np.ndarray:
    """Returns a part in the layout and dtype of the checkpoint.

    Raises:
      InputError: A value is too large for float16.
    """
    with np.errstate(over="ignore"):  # checked below
      stored = self.layout.to_stored(ours, self.dtype)
    check_overflow(self.name, ours, stored)
    return stored


@dataclasses.dataclass(frozen=True)
class Encoded:
  """A tensor of the file that is computed from one of the model, some whole rows at a time.

  Attributes:
    name: its name in the file.
    tensor: the tensor of the model.
    encode: computes a part of the file from rows in float32, in the layout of a checkpoint.
    shape: its shape in the file.
    dtype: its dtype in the file.
    readers: the number of tensors in the files that read the same parameter before this one. Each
      of them must read all of it, since the checksum of the parameter is compared for each.
  """

  name: str
  tensor: Tensor
  encode: Callable[[np.ndarray], np.ndarray]
  shape: tuple[int, ...]
  dtype: np.dtype
  readers: int = 0

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def reads(self, source: Source, sums: Sums) -> Iterator[Callable[[], Finish]]:
    read: Sums = {}  # of the part that is being finished

    def finish(inner: Finish) -> np.ndarray:
      read.clear()
      rows = inner()
      add(sums, {saved_arrays.key(path, self.readers): found for path, found in read.items()})
      if not rows.size:  # of a table that loses rows; see table_rows.py
        return np.empty(0, self.dtype)
      return np.ascontiguousarray(self.encode(rows))

    def start(begin: Callable[[], Finish]) -> Finish:
      return functools.partial(finish, begin())

    in_float32 = dataclasses.replace(self.tensor, dtype=np.dtype(np.float32))
    for begin in in_float32.reads(source, read):
      yield functools.partial(start, begin)


@dataclasses.dataclass(frozen=True)
class Constant:
  """A tensor of the file that does not depend on the model's weights, or the space between two."""

  name: str
  value: np.ndarray

  @property
  def shape(self) -> tuple[int, ...]:
    return self.value.shape

  @property
  def dtype(self) -> np.dtype:
    return self.value.dtype

  @property
  def nbytes(self) -> int:
    return self.value.nbytes

  def reads(self, source: Source, sums: Sums) -> Iterator[Callable[[], Finish]]:
    del source, sums
    yield lambda: lambda: self.value


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
    whole = functools.cache(lambda: _to_host(tensor.param[...], tensor.loop_index))

    def start(index: tuple[slice, ...]) -> Finish:
      at: tuple[Any, ...] = (*index, ...)  # with the ellipsis, an array even of a single number
      return lambda: tensor.to_stored(whole()[at])

    for index in tensor.layout.row_parts(declared.BLOCK):
      yield functools.partial(start, index)


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


def check_overflow(name: str, value: np.ndarray, stored: np.ndarray) -> None:
  """Raises InputError if a finite value has become infinite in float16."""
  if stored.dtype == np.float16 and np.isinf(stored).any() and not np.isinf(value).any():
    raise InputError(
      f"{name} contains {np.abs(value).max():.3g}, but the maximum of float16 is 65504. Set "
      "export.dtype to 'bfloat16'."
    )


def tensors_of(model: PyTree, dtype: np.dtype) -> list[Tensor]:
  """Returns the tensors of a model's parameters (or their shapes), layer by layer.

  Tables of tokens get the number of rows in the model's config, also if the parameters have
  another; see deployment/draft.py.

  Raises:
    ValueError: Two parameters declare the same name, which is a bug.
  """
  tensors = []
  vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
  for path, v in params.named_params(model):
    layout, own = declared.Layout(v), declared.dtype_of(v, dtype)
    is_other = VOCABULARY in v.get_metadata()["out"] and layout.shape[0] != vocabulary
    rows = vocabulary if is_other else None
    tensors += [Tensor(name, path, v, i, layout, own, rows) for name, i in declared.tensors(v)]
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


def parts(source: Source, tensors: Iterable[FileTensor], sums: Sums) -> Iterator[np.ndarray]:
  """Yields the parts of tensors, in order; the next ones are being read.

  Args:
    source: where the values are.
    tensors: the tensors.
    sums: the checksums of what is read are added.
  """
  started: collections.deque[Finish] = collections.deque()
  for tensor in tensors:
    for start in tensor.reads(source, sums):
      started.append(start())
      if len(started) > AHEAD:
        yield started.popleft()()
  while started:
    yield started.popleft()()


FileTensorT = TypeVar("FileTensorT", bound=FileTensor)


def in_files(tensors: Iterable[FileTensorT], limit: int) -> list[list[FileTensorT]]:
  """Returns the tensors of each file, in order.

  Args:
    tensors: the tensors.
    limit: the maximum size of the tensors of a file, unless one is larger.
  """
  files: list[list[FileTensorT]] = [[]]
  size = 0
  for t in tensors:
    if files[-1] and size + t.nbytes > limit:
      files.append([])
      size = 0
    files[-1].append(t)
    size += t.nbytes
  return files


@dataclasses.dataclass(frozen=True)
class Shard:
  """One file of tensors.

  Attributes:
    name: its name in the folder.
    tensors: what follows the header, without gaps.
    header: the bytes before the first tensor.
  """

  name: str
  tensors: tuple[FileTensor, ...]
  header: bytes

  @property
  def nbytes(self) -> int:
    """The size of the file."""
    return len(self.header) + sum(t.nbytes for t in self.tensors)
