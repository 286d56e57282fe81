"""Vectorised packing of integers into bits. The first bit is the lowest bit of a byte."""

from __future__ import annotations

import numpy as np

from distill_jax.errors import InputError


def width(n: int) -> int:
  """Returns the number of bits that hold 0 .. n-1."""
  return max(int(n) - 1, 0).bit_length()


def widths(n: np.ndarray) -> np.ndarray:
  """Returns the `width` of each number of an array (below 2^31), as uint8."""
  return np.frexp(np.maximum(n - 1, 0).astype(np.float64))[1].astype(np.uint8)


def pack(values: np.ndarray, nbits: np.ndarray | int) -> bytes:
  """Packs unsigned integers below 2^32 into `nbits` bits each: one number, or one per value."""
  if not len(values):
    return b""
  nbits = np.broadcast_to(np.asarray(nbits, np.int64), values.shape)
  ends = np.cumsum(nbits)
  at = ends - nbits
  shifted = values.astype(np.uint64) << (at & 31).astype(np.uint64)
  words = int(ends[-1] + 31) // 32 + 1
  # Values do not share bits, so adding is or-ing; float64 holds a 32-bit word exactly.
  low = np.bincount(at >> 5, (shifted & np.uint64(0xFFFFFFFF)).astype(np.float64), words)
  high = np.bincount((at >> 5) + 1, (shifted >> np.uint64(32)).astype(np.float64), words + 1)
  return (low + high[:words]).astype("<u4").tobytes()[: int(ends[-1] + 7) // 8]


def unpack(data: bytes | memoryview, nbits: np.ndarray | int, n: int) -> np.ndarray:
  """Unpacks n values of `pack`, as uint32.

  Raises:
    InputError: The data have the wrong length for n values.
  """
  if isinstance(nbits, int):
    at = np.arange(0, n * nbits, nbits) if nbits else np.zeros(n, np.int64)
    mask: np.ndarray | int = (1 << nbits) - 1
    total = n * nbits
  else:
    at = np.cumsum(nbits, dtype=np.int64)
    total = int(at[-1]) if n else 0
    at -= nbits
    mask = MASKS[nbits]
  if len(data) != (total + 7) // 8:
    raise InputError(f"A field has {len(data)} bytes; expected {(total + 7) // 8}.")
  if n == 1:  # a fast path for records of one position
    only = int.from_bytes(data, "little") & int(np.ravel(mask)[0])
    return np.array([only], np.uint32)
  words = np.frombuffer(bytes(data) + bytes(12 - len(data) % 4), "<u4")
  pairs = words[1:].astype(np.uint64) << np.uint64(32)
  pairs |= words[:-1]
  out = pairs[at >> 5]
  out >>= (at & 31).astype(np.uint64)
  out = out.astype(np.uint32)
  out &= np.asarray(mask, np.uint32)
  return out


MASKS = ((1 << np.arange(33, dtype=np.uint64)) - 1).astype(np.uint32)


def unary(gaps: np.ndarray) -> bytes:
  """Returns each gap g as g zeros and a one."""
  ends = np.cumsum(gaps + 1) - 1
  plane = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, np.uint8)
  plane[ends] = 1
  return np.packbits(plane, bitorder="little").tobytes()


def ones(data: bytes | memoryview) -> np.ndarray:
  """Returns the positions of the ones of a unary plane, int64. The g-th is at sum(gaps) + g."""
  bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
  return np.flatnonzero(bits.view(bool))
