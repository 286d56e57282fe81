"""Parses the header of a GGUF file: the metadata and the table of tensors.

It does so itself, because the reader of the `gguf` package creates an object for every string (1.8
s for a vocabulary of 49,152) and does not check lengths. As in llama.cpp, tensors must be adjacent
and in the listed order, so that a damaged offset cannot select the bytes of another tensor.
"""

from __future__ import annotations

import math
import mmap
import pathlib
import struct
from typing import Any, NamedTuple

import numpy as np

from distill_jax.errors import InputError
from distill_jax.runtime import extras
from distill_jax.types import JsonObject

with extras.needed("gguf"):
  import gguf
  from gguf import quants

# Struct codes of the value types in the metadata.
SCALARS = {
  0: "B",
  1: "b",
  2: "H",
  3: "h",
  4: "I",
  5: "i",
  6: "f",
  7: "?",
  10: "Q",
  11: "q",
  12: "d",
}
STRING, ARRAY = 8, 9


class Stored(NamedTuple):
  """The type, shape and position of a tensor in the file."""

  kind: gguf.GGMLQuantizationType
  shape: tuple[int, ...]  # in numpy's order, slowest axis first
  begin: int
  end: int


class Cursor:
  """A parser of the header, which checks every read against the size of the file."""

  def __init__(self, path: pathlib.Path):
    self.path, self.at = path, 0
    with path.open("rb") as f:
      self.size = path.stat().st_size
      if self.size < 24:
        raise InputError(
          f"{path} has {self.size} bytes, too few for a GGUF file. Download it again."
        )
      self.data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)

  def damaged(self, fault: str) -> InputError:
    return InputError(f"{self.path} is truncated or damaged: {fault}. Download the file again.")

  def take(self, n: int) -> bytes:
    if n > self.size - self.at:
      raise self.damaged(f"{n} bytes were expected at byte {self.at} of {self.size}")
    self.at += n
    return self.data[self.at - n : self.at]

  def scalar(self, code: str) -> Any:
    return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

  def string(self) -> str:
    at = self.at
    try:
      return self.take(self.scalar("Q")).decode()
    except UnicodeDecodeError:
      raise self.damaged(f"the string at byte {at} is not UTF-8") from None

  def value(self, kind: int) -> Any:
    if kind in SCALARS:
      return self.scalar(SCALARS[kind])
    if kind == STRING:
      return self.string()
    if kind != ARRAY:
      raise self.damaged(f"the value at byte {self.at} has the unknown type {kind}")
    inner, n = self.scalar("I"), self.scalar("Q")
    if inner in SCALARS:
      return np.frombuffer(self.take(n * struct.calcsize(SCALARS[inner])), SCALARS[inner]).tolist()
    if inner != STRING or n > (self.size - self.at) // 8:
      raise self.damaged(f"the array at byte {self.at} has {n} values of type {inner}")
    return [self.string() for _ in range(n)]

  def start(self) -> tuple[int, int]:
    """Returns (number of tensors, number of metadata keys)."""
    magic, version = self.take(4), self.scalar("I")
    if magic != b"GGUF" or version not in (2, 3):
      raise InputError(
        f"{self.path} starts with {magic!r}, version {version}; expected b'GGUF', version 2 or 3. "
        "Choose another file."
      )
    return self.scalar("Q"), self.scalar("Q")

  def metadata(self, n: int) -> JsonObject:
    meta: JsonObject = {}
    for _ in range(n):
      key = self.string()
      if key in meta:
        raise self.damaged(f"it has the key {key!r} twice")
      meta[key] = self.value(self.scalar("I"))
    return meta

  def tensors(self, n: int, align: object) -> dict[str, Stored]:
    """Parses the table of tensors and checks that they fill the rest of the file."""
    if type(align) is not int or not 0 < align <= 2**16 or align & (align - 1):
      raise self.damaged(f"its alignment is {align!r:.60}, which is not a power of two")
    table = []
    for _ in range(n):
      name, dims = self.string(), self.scalar("I")
      if dims > 4:
        raise self.damaged(f"{name} has {dims} axes")
      shape = tuple(self.scalar("Q") for _ in range(dims))[::-1]
      table.append((name, shape, self.scalar("I"), self.scalar("Q")))
    start = at = -(-self.at // align) * align
    entries: dict[str, Stored] = {}
    for name, shape, kind, offset in table:
      if name in entries:
        raise self.damaged(f"it has the tensor {name} twice")
      type_ = self._kind(name, kind)
      block, size = gguf.GGML_QUANT_SIZES[type_]
      if not shape or shape[-1] % block:
        raise self.damaged(f"{name} has shape {shape}, which blocks of {block} do not divide")
      end = at + math.prod(shape) // block * size
      if start + offset != at or end > self.size:
        raise self.damaged(
          f"{name} with shape {shape} starts at byte {start + offset} instead of {at}, or ends at "
          f"{end} of {self.size}"
        )
      entries[name] = Stored(type_, shape, at, end)
      at = -(-end // align) * align
    if self.size > at:
      raise self.damaged(f"its tensors end at byte {at} of {self.size}")
    return entries

  def _kind(self, name: str, kind: int) -> gguf.GGMLQuantizationType:
    known = {int(k): k for k in gguf.GGMLQuantizationType}
    plain = kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
    if kind not in known or not (plain or hasattr(quants, known[kind].name)):
      raise InputError(
        f"{self.path}: {name} has type {kind}, which the gguf package cannot read. Use a file with "
        "another quantisation."
      )
    return known[kind]
