"""Reads parameters from files on this machine in one process: for each device, what it holds.

Rows are read again for each device that holds some of their columns, which the page cache makes
cheap. A tensor is read and transposed in blocks of a few megabytes, which caches hold. Besides the
parameters, host memory has two blocks and, if the devices have their own memory, one shard.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from distill_jax.hub import declared
from distill_jax.hub.read_once import Place
from distill_jax.hub.weights import Weights
from distill_jax.runtime.progress import Progress

THREADS = 2  # one tensor is read while another is transposed

Spans = tuple[tuple[int, int], ...]  # (start, stop) along each axis


def nbytes(places: Sequence[Place], dtype: np.dtype) -> int:
  """Returns the bytes of the distinct parts of the parameters on this process's devices."""
  total = 0
  for v, place in places:
    part = math.prod(place.shard_shape(v.shape)) * declared.dtype_of(v, dtype).itemsize
    total += part * len(_shards_here(v, place))
  return total


def arrays(
  places: Sequence[Place],
  weights: Weights,
  dtype: np.dtype,
  keep_layers: tuple[int, ...],
  progress: Progress,
) -> Iterator[jax.Array]:
  """Yields the parameters in their sharding; see read_once.arrays."""
  with ThreadPoolExecutor(THREADS) as pool:
    filler = _Filler(weights, dtype, keep_layers, progress, pool)
    for v, place in places:
      yield filler.array(v, place)


@dataclasses.dataclass
class _Filler:
  """A reader of parameters from the tensors of a checkpoint."""

  weights: Weights
  dtype: np.dtype
  keep_layers: tuple[int, ...]
  progress: Progress
  pool: ThreadPoolExecutor

  def array(self, v: nnx.Variable, place: NamedSharding) -> jax.Array:
    """Returns the value of the abstract parameter `v`, in its sharding.

    Shards are read one at a time. jax.make_array_from_callback would hold all of this process's
    shards of a stacked parameter on the host at once.
    """
    arrays: dict[jax.Device, jax.Array] = {}
    for spans, devices in _shards_here(v, place).items():
      x = self._read_shard(v, spans)
      arrays |= {d: jax.device_put(x, d).block_until_ready() for d in devices}
    order = place.addressable_devices_indices_map(v.shape)
    return jax.make_array_from_single_device_arrays(v.shape, place, [arrays[d] for d in order])

  def _read_shard(self, v: nnx.Variable, spans: Spans) -> np.ndarray:
    """Returns the part of `v` at `spans`.

    For example, a parameter with axes (layers, embed, mlp) has one tensor per layer. For a shard
    with layers 2 and 3, the tensor of layer 3 is read into `out[1]`.
    """
    index = tuple(slice(start, stop) for start, stop in spans)
    shape = tuple(stop - start for start, stop in spans)
    out = _aligned_empty(shape, declared.dtype_of(v, self.dtype))
    layout, loops = declared.Layout(v), len(declared.loop_axes(v))
    whole = index[loops:]

    def read_tensor(named: tuple[str, tuple[int, ...]]) -> int:
      name, loop_index = named
      within: tuple[Any, ...] = tuple(
        i - start for i, (start, _) in zip(loop_index, spans, strict=False)
      )
      tensor = out[(*within, ...)]  # with the ellipsis, a view even of a single number
      for part in layout.row_parts(declared.BLOCK, whole):
        cut = layout.cut(part)
        pairs = zip(part, whole, strict=True)
        at: tuple[Any, ...] = tuple(slice(p.start - w.start, p.stop - w.start) for p, w in pairs)
        layout.to_ours(self.weights.read(name, cut.stored), cut, tensor[(*at, ...)])
      return tensor.nbytes

    for nbytes in self.pool.map(read_tensor, declared.tensors(v, index, self.keep_layers)):
      self.progress.add(nbytes)
    return out


def _shards_here(v: nnx.Variable, place: NamedSharding) -> dict[Spans, list[jax.Device]]:
  """Returns the distinct parts of `v` on this process's devices, each with its devices."""
  parts: dict[Spans, list[jax.Device]] = {}
  for device, index in place.addressable_devices_indices_map(v.shape).items():
    assert index is not None  # devices of this process have one
    spans = tuple(s.indices(n)[:2] for s, n in zip(index, v.shape, strict=True))
    parts.setdefault(spans, []).append(device)
  return parts


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Returns an array aligned to 64 bytes, which jax uses on CPU without a copy."""
  nbytes = math.prod(shape) * dtype.itemsize
  raw = np.empty(nbytes + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + nbytes].view(dtype).reshape(shape)
