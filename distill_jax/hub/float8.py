"""Block-scaled float8 weights, the published format of DeepSeek-V3, dequantised on reading.

For a matrix `NAME.weight` in float8 (e4m3), the checkpoint also has `NAME.weight_scale_inv`, with
one scale for each block of 128 x 128 values (arXiv:2412.19437, section 3.3). Scales are in float32
for DeepSeek-V3 and in bfloat16 for Qwen3.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from distill_jax.errors import InputError
from distill_jax.hub.weights import FLOATS, Index, Weights

SUFFIX = "_scale_inv"
# The table of all 256 values: a lookup is 4 times faster than a conversion by ml_dtypes.
VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def block_size(quantization: Any, path: str) -> tuple[int, int] | None:
  """Returns the rows and columns of a block with one scale; None for weights without scales.

  Args:
    quantization: `quantization_config` in config.json, or None.
    path: the folder, for errors.

  Raises:
    InputError: The weights have another quantisation.
  """
  if quantization is None:
    return None
  method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
  if method != "fp8":
    raise InputError(
      f"{path} is quantised by {method!r:.60}, but only block-scaled 'fp8' and "
      "'compressed-tensors' can be read. Use the weights before quantisation."
    )
  block = quantization.get("weight_block_size")
  whole = isinstance(block, list) and all(type(n) is int and 0 < n < 2**31 for n in block)
  if not whole or len(block) != 2:
    raise InputError(
      f"{path}: weight_block_size is {block!r:.60}; expected [rows, columns] of a block. Download "
      "config.json again."
    )
  return block[0], block[1]


class BlockScaled:
  """A reader that multiplies float8 matrices with their scales, which gives float32.

  Other tensors are unchanged.

  Raises:
    InputError: A matrix and its scales do not fit together.
  """

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
        f"{name} is {dtype} with shape {shape}, and {name + SUFFIX} has shape {scale}; expected a "
        f"float8_e4m3fn matrix and {blocks} scales for blocks of {self._block}. Download both "
        "again."
      )
    if scale_dtype not in FLOATS.values():
      raise InputError(
        f"{name + SUFFIX} is {scale_dtype}; expected one of {', '.join(FLOATS)}. Download it again."
      )

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
    scales = self._weights.read(name + SUFFIX).astype(np.float32)
    scales = np.repeat(scales, width, axis=1)[:, : shape[1]]
    scales, out = scales[:, index[1]], np.empty(x.shape, np.float32)
    for b in range(rows.start // height, -(-rows.stop // height)):  # one row of blocks at a time
      a, z = (min(max(r - rows.start, 0), len(rows)) for r in (b * height, (b + 1) * height))
      np.multiply(VALUES[x[a:z]], scales[b], out=out[a:z])
    return out
