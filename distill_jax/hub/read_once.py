"""Reads parameters on several processes, so that each byte of a checkpoint is read once.

A process that read what its own devices hold would read most of the checkpoint. Matrices are
stored by rows and often sharded by columns, and every replica would be read again. Instead, the
processes divide the rows of the stored tensors, which are contiguous bytes. Each row goes to one
device, and one jitted function per shape moves the values to their places over the interconnect.

The unit of work is a part of a parameter: consecutive layers of at most PART bytes, or one layer if
it is larger. With P processes, a process therefore reads 1/P of all bytes. Its host memory has
about AHEAD bytes and its share of one part. A device has its share of two parts besides the
parameters; XLA gathers a whole part on every device only if the devices do not divide its rows.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.hub import declared
from distill_jax.hub.weights import Weights
from distill_jax.nn import sharding
from distill_jax.runtime import remote_files
from distill_jax.runtime.progress import Progress

PART = 512 * 2**20  # bytes of a part over all processes
PIECE = 8 * 2**20  # bytes of one read
AHEAD = 512 * 2**20  # bytes that a process reads ahead

Place = tuple[nnx.Variable, NamedSharding]  # an abstract parameter and its storage sharding
Blocks = dict[jax.Device, np.ndarray]  # the rows of a part on each device of this process


@dataclasses.dataclass(frozen=True)
class Part:
  """Consecutive layers of a parameter, as one matrix of the rows of their tensors.

  Attributes:
    v: the abstract parameter.
    start: the first layer.
    count: the number of layers.
    dtype: the dtype of the parameter.
    rows: the sharding of the rows: each is on one device.
  """

  v: nnx.Variable
  start: int
  count: int
  dtype: np.dtype
  rows: NamedSharding

  @functools.cached_property
  def layout(self) -> declared.Layout:
    """The layout of each tensor."""
    return declared.Layout(self.v)

  @property
  def stored(self) -> tuple[int, ...]:
    """The stored shape of one tensor; a number counts as one row."""
    return self.layout.shape or (1,)

  @property
  def total(self) -> int:
    """The number of rows of all tensors."""
    loops = len(declared.loop_axes(self.v))
    tensors = self.count * math.prod(self.v.shape[1:loops]) if loops else 1
    return tensors * self.stored[0]

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the matrix: with rows of padding, so that all devices have equally many."""
    devices = self.rows.mesh.size
    return (-(-self.total // devices) * devices, *self.stored[1:])

  @property
  def row_bytes(self) -> int:
    """The bytes of a row in memory."""
    return math.prod(self.stored[1:]) * self.dtype.itemsize

  @functools.cached_property
  def spans(self) -> dict[jax.Device, tuple[int, int]]:
    """The (first row, last row) of each device of this process, without padding."""
    spans = {}
    for device, index in self.rows.addressable_devices_indices_map(self.shape).items():
      assert index is not None  # devices of this process have one
      first, last, _ = index[0].indices(self.shape[0])
      spans[device] = min(first, self.total), min(last, self.total)
    return spans

  def nbytes(self) -> int:
    """Returns the bytes that this process reads."""
    return sum(last - first for first, last in self.spans.values()) * self.row_bytes


def nbytes(places: Sequence[Place], dtype: np.dtype) -> int:
  """Returns the bytes of the parameters that this process reads, in their dtype."""
  return sum(part.nbytes() for place in places for part in _parts(*place, dtype))


def arrays(
  places: Sequence[Place],
  weights: Weights,
  dtype: np.dtype,
  keep_layers: tuple[int, ...],
  progress: Progress,
) -> Iterator[jax.Array]:
  """Yields the parameters in their sharding. All processes must call this with the same arguments.

  Args:
    places: the parameters.
    weights: the reader of the checkpoint.
    dtype: the dtype of parameters that are not declared exact.
    keep_layers: the layers of the checkpoint to keep; (): all.
    progress: counts the bytes of `nbytes`.
  """
  pool = ThreadPoolExecutor(remote_files.IN_FLIGHT)
  try:
    parts = (part for place in places for part in _parts(*place, dtype))
    read = _Reader(weights, keep_layers, progress, pool).read_ahead(parts)
    for v, place in places:
      array, done = None, 0
      while done < _layers(v):
        part, blocks = next(read)
        rows = jax.make_array_from_single_device_arrays(
          part.shape, part.rows, [jax.device_put(x, device) for device, x in blocks.items()]
        )
        array = jax.block_until_ready(_placed(part, place, rows, array))
        done += part.count
      assert array is not None
      yield array
  finally:
    pool.shutdown(cancel_futures=True)


def _layers(v: nnx.Variable) -> int:
  """Returns the number of slices along the first axis if they are separate tensors; otherwise 1."""
  return v.shape[0] if declared.loop_axes(v) else 1


def _parts(v: nnx.Variable, place: NamedSharding, dtype: np.dtype) -> Iterator[Part]:
  """Yields the parts of a parameter in order."""
  layers, own = _layers(v), declared.dtype_of(v, dtype)
  layer_bytes = math.prod(v.shape) // layers * own.itemsize
  # A sharded axis is not divided: XLA would gather the parameter to update a part of it.
  divided = not place.spec or place.spec[0] is None
  count = min(max(PART // layer_bytes, 1), layers) if divided else layers
  rows = NamedSharding(place.mesh, PartitionSpec(sharding.MESH_AXES))
  for start in range(0, layers, count):
    yield Part(v, start, min(count, layers - start), own, rows)


def _placed(part: Part, place: NamedSharding, rows: jax.Array, into: jax.Array | None) -> jax.Array:
  """Returns the parameter `into` with the values of a part; None: a new one."""
  layout, loops = part.layout, len(declared.loop_axes(part.v))
  lead = (part.count, *part.v.shape[1:loops]) if loops else ()
  whole = part.count == _layers(part.v)
  move = _mover(lead, layout.grouped, layout.axes, place, whole)
  if whole:
    return move(rows)
  if into is None:
    into = jax.jit(lambda: jnp.zeros(part.v.shape, part.dtype), out_shardings=place)()
  return move(into, rows, part.start)


@functools.cache
def _mover(
  lead: tuple[int, ...],
  grouped: tuple[int, ...],
  axes: tuple[int, ...],
  place: NamedSharding,
  whole: bool,
) -> Callable[..., jax.Array]:
  """Returns the jitted function that gives rows the layout and sharding of their parameter.

  Args:
    lead: the number of tensors along each loop axis.
    grouped: the shape of a tensor in grouped axes; see declared.Layout.
    axes: the permutation of the grouped axes that gives ours.
    place: the sharding of the parameter.
    whole: whether the rows are the whole parameter. If not, they are written into it.
  """
  shape = (*lead, *grouped)
  order = (*range(len(lead)), *(len(lead) + i for i in axes))

  def ours(rows: jax.Array) -> jax.Array:
    stored = rows[: math.prod(shape) // math.prod(rows.shape[1:])]  # without padding
    return stored.reshape(shape).transpose(order)

  def update(into: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(into, ours(rows), start, 0)

  if whole:
    return jax.jit(ours, out_shardings=place)
  return jax.jit(update, out_shardings=place, donate_argnums=0)


@dataclasses.dataclass
class _Reader:
  """A reader of rows with a pool of threads."""

  weights: Weights
  keep_layers: tuple[int, ...]
  progress: Progress
  pool: ThreadPoolExecutor

  def read_ahead(self, parts: Iterable[Part]) -> Iterator[tuple[Part, Blocks]]:
    """Yields each part with its rows on this process, while the next parts are being read."""
    begun: collections.deque[tuple[Part, Blocks, list[Future[int]]]] = collections.deque()
    for part in parts:
      begun.append((part, *self._begin(part)))
      while len(begun) > 1 and sum(p.nbytes() for p, _, _ in begun) > AHEAD:
        yield self._finish(*begun.popleft())
    while begun:
      yield self._finish(*begun.popleft())

  def _begin(self, part: Part) -> tuple[Blocks, list[Future[int]]]:
    """Returns the blocks of a part, and the reads that fill them."""
    index = (slice(part.start, part.start + part.count),) + (slice(None),) * 8
    loops = len(declared.loop_axes(part.v))
    names = [n for n, _ in declared.tensors(part.v, index[:loops], self.keep_layers)]
    blocks: Blocks = {}
    reads = []
    for device, (first, last) in part.spans.items():
      blocks[device] = np.zeros((part.shape[0] // part.rows.mesh.size, *part.shape[1:]), part.dtype)
      for at, name, rows in _pieces(part, names, first, last):
        into = blocks[device][at - first : at - first + len(rows)]
        reads.append(self.pool.submit(self._read, name, rows, part.stored, into))
    return blocks, reads

  def _read(self, name: str, rows: range, stored: tuple[int, ...], into: np.ndarray) -> int:
    """Reads rows of a tensor, and returns their bytes."""
    rest = (slice(0, n) for n in stored[1:])
    is_number = not self.weights.shape(name)
    index = None if is_number else (slice(rows.start, rows.stop), *rest)
    into[...] = self.weights.read(name, index)
    return into.nbytes

  def _finish(self, part: Part, blocks: Blocks, reads: list[Future[int]]) -> tuple[Part, Blocks]:
    for read in reads:
      self.progress.add(read.result())
    return part, blocks


def _pieces(
  part: Part, names: Sequence[str], first: int, last: int
) -> Iterator[tuple[int, str, range]]:
  """Yields (row of the part, tensor, rows of the tensor) for the reads of a range of rows."""
  height, most = part.stored[0], max(PIECE // max(part.row_bytes, 1), 1)
  while first < last:
    i, row = divmod(first, height)
    stop = min(row + most, row + last - first, height)
    yield first, names[i], range(row, stop)
    first += stop - row
