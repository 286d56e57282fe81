"""Integer weights in the format of compressed-tensors, which `transformers` and vLLM load.

The weight of a linear layer is q * s: integers q of 4 or 8 bits [rows, columns], and scales s for
each row, or for each group of columns in it. It is stored in one of two ways:

  pack-quantized   NAME.weight_packed  int32 [rows, columns * bits / 32]: consecutive columns of
                                       q + 2^(bits - 1), the first one in the lowest bits
                   NAME.weight_shape   int64 [2]: rows and columns
  int-quantized    NAME.weight         int8 [rows, columns]: q of 8 bits

and NAME.weight_scale [rows, columns / group], in a floating-point dtype. On reading, weights are
dequantised to float32: exactly, because a product of q and a bfloat16 scale has 15 bits.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from distill_jax.errors import InputError
from distill_jax.hub.weights import FLOATS, Index, Weights

METHOD = "compressed-tensors"
PACKED, INTEGERS = "pack-quantized", "int-quantized"
ROWS = 64  # rows dequantised at a time, so that temporary arrays fit the cache


@dataclasses.dataclass(frozen=True)
class Scheme:
  """The way in which the linear weights of a model are stored.

  Attributes:
    bits: the bits of an integer: 4 or 8.
    group: the number of consecutive columns that share a scale; 0: all columns of a row.
    packed: whether words of 32 bits contain the integers ("pack-quantized").
  """

  bits: int
  group: int
  packed: bool

  @property
  def per_word(self) -> int:
    """The number of columns in one stored number."""
    return 32 // self.bits if self.packed else 1


def pack(q_RC: np.ndarray, bits: int) -> np.ndarray:
  """Returns int8 integers as int32 words [R, C * bits / 32]."""
  if bits == 8:
    bytes_RB = q_RC.view(np.uint8) ^ 0x80
  else:
    nibbles_RC = (q_RC + np.int8(8)).view(np.uint8)
    bytes_RB = nibbles_RC[:, ::2] | nibbles_RC[:, 1::2] << 4
  return np.ascontiguousarray(bytes_RB).view("<i4")


def unpack(words_RW: np.ndarray, bits: int) -> np.ndarray:
  """Returns the int8 integers in int32 words [R, W]; the inverse of `pack`."""
  bytes_RB = np.ascontiguousarray(words_RW, "<i4").view(np.uint8)
  if bits == 8:
    return (bytes_RB ^ 0x80).view(np.int8)
  q_RB2 = np.stack([bytes_RB & 15, bytes_RB >> 4], -1).view(np.int8) - np.int8(8)
  return q_RB2.reshape(len(bytes_RB), 2 * bytes_RB.shape[1])


def scheme_of(quantization: Any, path: str) -> Scheme | None:
  """Returns how the weights are stored; None if they are not in this format.

  Args:
    quantization: `quantization_config` in config.json, or None.
    path: the folder, for errors.

  Raises:
    InputError: The weights are in a variant of the format that cannot be read.
  """
  if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
    return None
  groups = quantization.get("config_groups")
  found: list[Scheme | None] = [None]
  if isinstance(groups, dict) and groups and not quantization.get("transform_config"):
    found = [_group_scheme(g, quantization.get("format")) for g in groups.values()]
  if found[0] is None or any(scheme != found[0] for scheme in found):
    raise InputError(
      f"{path} has a variant of {METHOD} that cannot be read. Only symmetric integers of 4 or 8 "
      f"bits, in the same way for all layers, with a scale for each output or group of inputs can "
      f"be read ({PACKED!r} or {INTEGERS!r}). Use the weights before quantisation."
    )
  return found[0]


def _group_scheme(group: Any, form: Any) -> Scheme | None:
  """Returns the scheme of an entry of `config_groups`, or None."""
  weights = group.get("weights") if isinstance(group, dict) else None
  if not isinstance(weights, dict):
    return None
  form = group.get("format") or form
  bits, size, strategy = (weights.get(k) for k in ("num_bits", "group_size", "strategy"))
  if type(bits) is not int:
    return None
  is_known = (
    (bits in (4, 8) if form == PACKED else form == INTEGERS and bits == 8)
    and weights.get("type", "int") == "int"
    and weights.get("symmetric", True) is True
    and weights.get("actorder") in (None, "weight", "static")
  )
  if not is_known:
    return None
  if strategy == "channel":
    return Scheme(bits, 0, form == PACKED)
  if strategy == "group" and type(size) is int and 0 < size < 2**31:
    return Scheme(bits, size, form == PACKED)
  return None


class IntegerWeights:
  """A reader that multiplies integers with their scales, which gives float32.

  Other tensors are unchanged.

  Raises:
    InputError: Integers and their scales do not fit together.
  """

  def __init__(self, weights: Weights, scheme: Scheme):
    self.files = weights.files
    self._weights, self._scheme = weights, scheme
    names = weights.names()
    end = "_packed" if scheme.packed else ""
    scaled = [n.removesuffix("_scale") for n in names if n.endswith(".weight_scale")]
    self._integers = {n: n + end for n in scaled if n + end in names}  # by name of the weight
    for name in self._integers:
      self._check(name)

  def _check(self, name: str) -> None:
    stored, scale = self._integers[name], name + "_scale"
    if stored != name and name in self._weights.names():
      raise InputError(f"{self.files[0].path} contains {name} twice. Download the files again.")
    dtype, shape = self._weights.dtype(stored), self._weights.shape(stored)
    of_scale, found = self._weights.dtype(scale), self._weights.shape(scale)
    expected = np.dtype(np.int32 if self._scheme.packed else np.int8)
    if len(shape) != 2 or dtype != expected or of_scale not in FLOATS.values():
      raise InputError(
        f"{stored} is {dtype} with shape {shape}, and {scale} is {of_scale}; expected an "
        f"{expected} matrix and scales in {', '.join(FLOATS)}. Download both again."
      )
    columns = self.shape(name)[1]
    group = self._scheme.group or columns
    if not columns or columns % group or found != (shape[0], columns // group):
      raise InputError(
        f"{scale} has shape {found}; expected a scale for each of {shape[0]} rows and each group "
        f"of {group} of the {columns} columns. Download config.json and the weights again."
      )

  def names(self) -> set[str]:
    of_integers = {n + end for n in self._integers for end in ("_packed", "_scale", "_shape")}
    return (self._weights.names() - of_integers) | self._integers.keys()

  def shape(self, name: str) -> tuple[int, ...]:
    if name not in self._integers:
      return self._weights.shape(name)
    rows, stored = self._weights.shape(self._integers[name])
    return rows, stored * self._scheme.per_word

  def dtype(self, name: str) -> np.dtype:
    return np.dtype(np.float32) if name in self._integers else self._weights.dtype(name)

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    if name not in self._integers:
      return self._weights.read(name, index)
    q_RC, scale_RG = self.read_integers(name, index[0] if index else None)
    columns = range(q_RC.shape[1])[index[1]] if index else range(q_RC.shape[1])
    out = np.empty((len(q_RC), len(columns)), np.float32)
    for i in range(0, len(q_RC), ROWS):
      at = slice(i, i + ROWS)
      groups = q_RC[at].reshape(-1, scale_RG.shape[1], q_RC.shape[1] // scale_RG.shape[1])
      whole = groups * scale_RG[at, :, None].astype(np.float32)
      out[at] = whole.reshape(-1, q_RC.shape[1])[:, columns.start : columns.stop]
    return out

  def read_integers(self, name: str, rows: slice | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the integers, int8 [R, C], and the scales [R, C / group] of rows of a weight."""
    index = None if rows is None else (rows, slice(None))
    stored = self._weights.read(self._integers[name], index)
    scale_RG = self._weights.read(name + "_scale", index)
    return unpack(stored, self._scheme.bits) if self._scheme.packed else stored, scale_RG
