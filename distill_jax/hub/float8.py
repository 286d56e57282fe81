"""Block-scaled float8 weights, as DeepSeek-V3 is published: dequantised as they are read.

A matrix `NAME.weight` in float8 (e4m3) lies beside `NAME.weight_scale_inv`, float32, with
one scale for each block of 128 x 128 values (arXiv:2412.19437, section 3.3).
"""

from __future__ import annotations

import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from distill_jax.errors import InputError
from distill_jax.hub.weights import Index, Weights

SUFFIX = "_scale_inv"
# All 256 values, looked up: 4 times faster than ml_dtypes converts.
VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def scaled(weights: Weights, quantization: Any, path: pathlib.Path) -> Weights:
  """A reader of the true values, by what config.json says in its `quantization_config`.

  Raises:
    InputError: a quantisation other than this one; scales that do not fit their matrix.
  """
  if quantization is None:
    return weights
  method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
  if method != "fp8":
    raise InputError(
      f"{path} is quantised by {method!r:.60}; only block-scaled 'fp8' can be read, so give the "
      "weights that it was made from"
    )
  block = quantization.get("weight_block_size")
  whole = isinstance(block, list) and all(type(n) is int and 0 < n < 2**31 for n in block)
  if not whole or len(block) != 2:
    raise InputError(
      f"{path} has weight_block_size {block!r:.60}; [rows, columns] of a block were expected"
    )
  return BlockScaled(weights, (block[0], block[1]))


class BlockScaled:
  """Reads float8 matrices as float32, multiplied by their scales; the rest as it is."""

  def __init__(self, weights: Weights, block: tuple[int, int]):
    self.files = weights.files
    self._weights, self._block = weights, block
    names = weights.names()
    self._scaled = {n for n in names if n + SUFFIX in names}
    for name in self._scaled:
      self._check(name)

  def _check(self, name: str) -> None:
    shape, dtype = self._weights.shape(name), self._weights.dtype(name)
    scale, scale_dtype = self._weights.shape(name + SUFFIX), self._weights.dtype(name + SUFFIX)
    blocks = tuple(-(-n // b) for n, b in zip(shape, self._block, strict=False))
    if len(shape) != 2 or scale != blocks or dtype != ml_dtypes.float8_e4m3fn:
      raise InputError(
        f"{name} is {dtype} of shape {shape} and {name + SUFFIX} has shape {scale}; in blocks of "
        f"{self._block} a float8_e4m3fn matrix of {blocks} blocks was expected, fetch both again"
      )
    if scale_dtype != np.float32:
      raise InputError(f"{name + SUFFIX} is {scale_dtype}; scales are float32, fetch it again")

  def names(self) -> set[str]:
    return self._weights.names() - {n + SUFFIX for n in self._scaled}

  def shape(self, name: str) -> tuple[int, ...]:
    return self._weights.shape(name)

  def dtype(self, name: str) -> np.dtype:
    return np.dtype(np.float32) if name in self._scaled else self._weights.dtype(name)

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    if name not in self._scaled:
      return self._weights.read(name, index)
    shape, (height, width) = self.shape(name), self._block
    index = index or (slice(0, shape[0]), slice(0, shape[1]))
    x = self._weights.read(name, index).view(np.uint8)
    rows = range(shape[0])[index[0]]
    scales = np.repeat(self._weights.read(name + SUFFIX), width, axis=1)[:, : shape[1]]
    scales, out = scales[:, index[1]], np.empty(x.shape, np.float32)
    for b in range(rows.start // height, -(-rows.stop // height)):  # a row of blocks at a time
      a, z = (min(max(r - rows.start, 0), len(rows)) for r in (b * height, (b + 1) * height))
      np.multiply(VALUES[x[a:z]], scales[b], out=out[a:z])
    return out
