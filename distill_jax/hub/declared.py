"""The layouts of parameters in a checkpoint, derived from the declarations of the parameters.

A parameter is declared once (params.py), with its axes, its Hugging Face name and the axes that are
first in torch. From the declaration this module derives the names and shapes of its tensors in a
checkpoint, and converts values between the two layouts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from distill_jax.hub.weights import Index
from distill_jax.runtime.distributed import host_device

BLOCK = 2**21  # elements that are converted at a time: 4 MB of bfloat16, which caches hold


def loop_axes(v: nnx.Variable) -> tuple[str, ...]:
  """Returns the leading axes that are separate tensors in a checkpoint: `layers`, `experts`."""
  meta = v.get_metadata()
  axes = tuple(a for a in meta["axes"] if "{" + a + "}" in meta["hf"])
  if meta["axes"][: len(axes)] != axes:
    raise ValueError(f"{meta['hf']}: the axes {axes} must be the first of {meta['axes']}.")
  return axes


def dtype_of(v: nnx.Variable, dtype: np.dtype) -> np.dtype:
  """Returns the dtype of `v` in a model with `dtype`: float32 for parameters declared exact."""
  return np.dtype(np.float32) if v.get_metadata()["exact"] else dtype


def tensors(
  v: nnx.Variable, index: Index | None = None, layers: tuple[int, ...] = ()
) -> Iterator[tuple[str, tuple[int, ...]]]:
  """Yields (tensor name, index along the loop axes) for the tensors of `v`.

  Args:
    v: the parameter.
    index: the part of `v` to read; None: all of it.
    layers: layer `layers[i]` of the checkpoint becomes layer i of `v`; (): the same layers.
  """
  axes, first = loop_axes(v), v.get_metadata()["first"]
  sizes = v.shape[: len(axes)]
  index = index or (slice(None),) * len(axes)
  for loop_index in _grid([range(n)[s] for n, s in zip(sizes, index, strict=False)]):
    numbers = dict(zip(axes, loop_index, strict=True))
    if "layers" in numbers:
      layer = numbers["layers"] + first
      numbers["layers"] = layers[layer] if layers else layer
    yield v.get_metadata()["hf"].format(**numbers), loop_index


def _grid(ranges: list[range]) -> Iterator[tuple[int, ...]]:
  """Yields the product of ranges, without copying them as itertools.product does.

  Ranges can be very long if a config is damaged.
  """
  if not ranges:
    yield ()
    return
  for i in ranges[0]:
    for rest in _grid(ranges[1:]):
      yield (i, *rest)


def matcher(v: nnx.Variable) -> Callable[[str], bool]:
  """Returns a function that is True for the names of the tensors of `v`."""
  axes, hf = loop_axes(v), v.get_metadata()["hf"]
  pattern = re.escape(hf)
  for axis in axes:
    pattern = pattern.replace(re.escape("{" + axis + "}"), f"(?P<{axis}>0|[1-9][0-9]{{0,8}})")
  known = {axis: range(n) for axis, n in zip(axes, v.shape, strict=False)}
  if "layers" in known:
    first = v.get_metadata()["first"]
    known["layers"] = range(first, first + len(known["layers"]))
  compiled = re.compile(pattern)

  def matches(name: str) -> bool:
    found = compiled.fullmatch(name)
    return found is not None and all(int(i) in known[a] for a, i in found.groupdict().items())

  return matches


class Cut(NamedTuple):
  """The slices that select a part of a tensor; see Layout.

  Attributes:
    stored: the slices of the stored tensor to read.
    grouped: the shape of the result in grouped axes.
    rest: the slices of the grouped axes that select the part.
  """

  stored: Index
  grouped: tuple[int, ...]
  rest: Index


class Layout:
  """The layout of one tensor of a parameter (without its loop axes) in a checkpoint.

  There are three coordinate systems:

    ours     the declared axes:   (embed 64, heads 4, head_dim 16), out="heads head_dim"
    grouped  the order in torch:  (heads 4, head_dim 16, embed 64), the axes in `out` first
    stored   flattened groups:    (heads * head_dim 64, embed 64), the shape in the checkpoint

  For example, heads 2 and 3 for the first 32 of embed are `[0:32, 2:4, 0:16]` in our axes. In the
  stored tensor they are `[32:64, 0:32]`, since head 2 starts at row 2 * 16. The result has the
  shape (2, 16, 32) in grouped axes. But one half of each head, `[0:64, 0:4, 0:8]` in our axes, is
  not a range of stored rows. So all rows of these heads are read, and `[:, 0:8, :]` is selected
  from the grouped shape (4, 16, 64).

  Without `out`, each axis is a separate group, and the three systems are the same.

  Attributes:
    ours: the shape in our axes.
    shape: the stored shape.
    grouped: the shape in grouped axes.
    axes: the permutation of the grouped axes that gives ours.
  """

  def __init__(self, v: nnx.Variable):
    loops = len(loop_axes(v))
    axes, out = v.get_metadata()["axes"][loops:], v.get_metadata()["out"]
    first = [axes.index(a) for a in out]
    rest = [i for i, a in enumerate(axes) if a not in out]
    # The axes of ours in each stored axis.
    self._groups = [first, rest] if first and rest else [first] if first else [[i] for i in rest]
    self._order = [i for group in self._groups for i in group]
    self.ours: tuple[int, ...] = v.shape[loops:]
    self.shape = tuple(math.prod(self.ours[i] for i in group) for group in self._groups)
    self.grouped = tuple(self.ours[i] for i in self._order)
    self.axes = tuple(int(i) for i in np.argsort(self._order))
    # The common case of two groups in reverse order is a transposition.
    in_place = self._order == sorted(self._order)
    self._swaps = len(self._groups) == 2 and not in_place and sorted(self._order) == rest + first

  def cut(self, index: Index) -> Cut:
    """Returns the slices of the stored tensor for the part at `index`, in our axes."""
    stored: list[slice] = []
    grouped: list[int] = []
    left: list[slice] = []
    for group in self._groups:
      sizes = [self.ours[i] for i in group]
      spans = [index[i].indices(self.ours[i])[:2] for i in group]
      inner = math.prod(sizes[1:])  # stored rows per index of the group's first axis
      first, last = spans[0]
      stored.append(slice(first * inner, last * inner))
      grouped += [last - first, *sizes[1:]]
      left += [slice(None), *(slice(*span) for span in spans[1:])]
    return Cut(tuple(stored), tuple(grouped), tuple(left))

  def to_ours(self, stored: np.ndarray, cut: Cut, out: np.ndarray) -> None:
    """Writes the values read at `cut.stored` into `out`, in our axes and the dtype of `out`."""
    grouped = stored.reshape(cut.grouped)[cut.rest]
    if self._swaps:
      rows = math.prod(grouped.shape[: len(self._groups[0])])
      out[...] = _transposed(grouped.reshape(rows, -1)).reshape(out.shape)
    else:
      out[...] = grouped.transpose(self.axes)

  def row_parts(self, max_elements: int, within: Index | None = None) -> Iterator[Index]:
    """Yields the slices, in our axes, of consecutive ranges of stored rows.

    Args:
      max_elements: the largest size of a part, unless one index of the first axis has more.
      within: the slices (start, stop) to divide, in our axes; None: the whole tensor.
    """
    if not self.ours:
      yield ()
      return
    axis, within = self._groups[0][0], within or tuple(slice(0, n) for n in self.ours)
    sizes = [len(range(n)[s]) for n, s in zip(self.ours, within, strict=True)]
    one = math.prod(sizes[:axis] + sizes[axis + 1 :])  # elements of one index of the axis
    step, stop = max(1, max_elements // max(1, one)), within[axis].stop
    for i in range(within[axis].start, stop, step):
      yield (*within[:axis], slice(i, min(i + step, stop)), *within[axis + 1 :])

  def to_stored(self, ours: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns a tensor, or a part from `row_parts`, in the layout of the checkpoint."""
    shape = tuple(math.prod(ours.shape[i] for i in group) for group in self._groups)
    if not self._swaps:
      grouped = ours.transpose(self._order)
      return np.ascontiguousarray(grouped.reshape(shape), dtype)
    x, rows = ours.reshape(shape[::-1]), max(1, BLOCK // max(1, shape[1]))
    if shape[0] <= rows:
      return _transposed(x.astype(dtype, copy=False))
    out = np.empty(shape, dtype)
    for i in range(0, shape[0], rows):
      out[i : i + rows] = _transposed(x[:, i : i + rows].astype(dtype, copy=False))
    return out


def _transposed(x: np.ndarray) -> np.ndarray:
  """Returns the transpose of a matrix with numbers of at most 4 bytes.

  jax copies to the host's CPU in blocks that fit registers, 3 times as fast as numpy.
  """
  bits = x.view(f"u{x.itemsize}")
  return np.asarray(jax.device_put(bits.T, host_device())).view(x.dtype)
