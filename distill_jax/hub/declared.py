"""Parameters' declarations, applied to a checkpoint and inverted.

A parameter is declared once (params.py) with its axes, its Hugging Face name and the axes
that torch puts first. From that follow, here, which tensors it is spread over, the shape
of each, and how values move between the two layouts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from distill_jax.hub.weights import Index

BLOCK = 16  # rows transposed at a time: numpy alone is 4 times slower on a large matrix


def loop_axes(v: Any) -> tuple[str, ...]:
  """The leading axes that Hugging Face spreads over tensors: `layers`, `experts`."""
  meta = v.get_metadata()
  axes = tuple(a for a in meta["axes"] if "{" + a + "}" in meta["hf"])
  if meta["axes"][: len(axes)] != axes:
    raise ValueError(f"{meta['hf']}: the axes {axes} have to lead {meta['axes']}")
  return axes


def dtype_of(v: Any, dtype: np.dtype) -> np.dtype:
  """What `v` is kept as where the other parameters are `dtype`."""
  return np.dtype(np.float32) if v.get_metadata()["exact"] else dtype


def tensors(
  v: Any, index: Index | None = None, layers: tuple[int, ...] = ()
) -> Iterator[tuple[str, tuple[int, ...]]]:
  """(tensor name, index along the loop axes) of the tensors that hold `v`, or its `index`.

  With `layers`, our layer i goes by the name of layer `layers[i]`.
  """
  axes, first = loop_axes(v), v.get_metadata()["first"]
  sizes = v.shape[: len(axes)]
  index = index or (slice(None),) * len(axes)
  for at in _grid([range(n)[s] for n, s in zip(sizes, index, strict=False)]):
    named = dict(zip(axes, at, strict=True))
    if "layers" in named:
      named["layers"] += first
      named["layers"] = layers[named["layers"]] if layers else named["layers"]
    yield v.get_metadata()["hf"].format(**named), at


def _grid(ranges: list[range]) -> Iterator[tuple[int, ...]]:
  """itertools.product, without its copy of the ranges: a damaged config can make them huge."""
  if not ranges:
    yield ()
    return
  for i in ranges[0]:
    for rest in _grid(ranges[1:]):
      yield (i, *rest)


def matcher(v: Any) -> Callable[[str], bool]:
  """Whether a name is one of the tensors of `v`, without listing them."""
  axes, hf = loop_axes(v), v.get_metadata()["hf"]
  pattern = re.escape(hf)
  for axis in axes:
    pattern = pattern.replace(re.escape("{" + axis + "}"), f"(?P<{axis}>0|[1-9][0-9]{{0,8}})")
  first = lambda axis: v.get_metadata()["first"] if axis == "layers" else 0
  known = {a: range(first(a), first(a) + n) for a, n in zip(axes, v.shape, strict=False)}
  name = re.compile(pattern)

  def matches(given: str) -> bool:
    found = name.fullmatch(given)
    return found is not None and all(int(i) in known[a] for a, i in found.groupdict().items())

  return matches


class Layout:
  """How one tensor of `v` (without its loop axes) lies in a checkpoint.

  Attributes:
    shape: in the checkpoint.
    ours: our shape.
  """

  def __init__(self, v: Any):
    n = len(loop_axes(v))
    axes, self.ours, out = v.get_metadata()["axes"][n:], v.shape[n:], v.get_metadata()["out"]
    first, rest = [axes.index(a) for a in out], [i for i, a in enumerate(axes) if a not in out]
    # Without `out` every axis stands for itself; with it there are two groups, flattened.
    groups = [first, rest] if first and rest else [first] if first else [[i] for i in rest]
    self._groups = groups
    self._order = [i for g in groups for i in g]
    self.shape = tuple(math.prod(self.ours[i] for i in g) for g in groups)
    # The common case, two groups that swap places, is a plain transposition.
    self._swaps = len(groups) == 2 and self._order != sorted(self._order) == rest + first

  def slices(self, index: Index) -> tuple[Index, tuple[int, ...], Index]:
    """What to read of a tensor for `index` of ours.

    Returns:
      The slices of the tensor; the shape of what they give, in our axes in torch's order;
      and the slices of that which are left to take.
    """
    read, shape, left = [], [], []
    for group in self._groups:
      sizes, spans = [self.ours[i] for i in group], [index[i].indices(self.ours[i]) for i in group]
      inner = math.prod(sizes[1:])
      lo, hi, _ = spans[0]
      # A flattened group can be sliced along its first axis if the others are whole.
      if all((a, b) == (0, n) for (a, b, _), n in zip(spans[1:], sizes[1:], strict=True)):
        read.append(slice(lo * inner, hi * inner))
        shape += [hi - lo, *sizes[1:]]
        left += [slice(None)] * len(group)
      else:
        read.append(slice(0, sizes[0] * inner))
        shape += sizes
        left += [slice(a, b) for a, b, _ in spans]
    return tuple(read), tuple(shape), tuple(left)

  def to_ours(self, x: np.ndarray, shape: tuple[int, ...], left: Index, out: np.ndarray) -> None:
    """Writes what `slices` had read into `out`, in our axes, in its dtype."""
    x = x.reshape(shape)[left]
    if self._swaps:
      rows = math.prod(x.shape[: len(self._groups[0])])
      _transpose(x.reshape(rows, -1), out.reshape(-1, rows))
    else:
      out[...] = x.transpose(np.argsort(self._order))

  def to_theirs(self, x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """One whole tensor of ours as the checkpoint holds it."""
    if not self._swaps:
      return np.ascontiguousarray(x.transpose(self._order).reshape(self.shape), dtype)
    out = np.empty(self.shape, dtype)
    _transpose(x.reshape(self.shape[::-1]), out)
    return out


def _transpose(x: np.ndarray, out: np.ndarray) -> None:
  if x.dtype == out.dtype == ml_dtypes.bfloat16:  # numpy copies what it knows faster
    x, out = x.view(np.uint16), out.view(np.uint16)
  for i in range(0, len(x), BLOCK):
    out[:, i : i + BLOCK] = x[i : i + BLOCK].T
