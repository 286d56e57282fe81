"""Vectorised packing of integers into bits. The first bit is the lowest bit of a byte."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from distill_jax.records import numbers


def width(n: int) -> int:
  """Returns the number of bits that hold 0 .. n-1."""
  return max(int(n) - 1, 0).bit_length()


def widths(n: np.ndarray) -> np.ndarray:
  """Returns the `width` of each number of an array (below 2^31), as uint32."""
  return np.frexp(np.maximum(n - 1, 0).astype(np.float64))[1].astype(np.uint32)


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


def unary(gaps: np.ndarray) -> bytes:
  """Returns each gap g as g zeros and a one."""
  ends = np.cumsum(gaps + 1) - 1
  plane = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, np.uint8)
  plane[ends] = 1
  return np.packbits(plane, bitorder="little").tobytes()


class Joined(NamedTuple):
  """A stored field of several records, whose bytes are joined.

  Attributes:
    data: The bytes of all records.
    start_B: Index of the first byte of each record.
    size_B: Number of bytes of each record.
  """

  data: bytes
  start_B: list[int]
  size_B: list[int]

  @classmethod
  def of(cls, parts: Sequence[bytes]) -> Joined:
    sizes = [len(part) for part in parts]
    return cls(b"".join(parts), numbers.starts(sizes), sizes)

  @classmethod
  def of_rows(cls, bytes_BL: np.ndarray) -> Joined:
    """Returns a field of which each record has as many bytes, uint8 [B, L]."""
    B, size = bytes_BL.shape
    return cls(bytes_BL.tobytes(), [i * size for i in range(B)], [size] * B)

  @property
  def parts(self) -> list[bytes]:
    """The bytes of each record."""
    both = zip(self.start_B, self.size_B, strict=True)
    return [self.data[start : start + size] for start, size in both]

  def unpack(self, nbits: int, count_B: list[int]) -> np.ndarray:
    """Unpacks values of at most 24 bits that `pack` packed into equally many bits each, as uint32.

    Args:
      nbits: Number of bits of a value.
      count_B: Number of values of each record.

    Raises:
      InputError: The bytes of a record have the wrong length for its values.
    """
    numbers.whole("bytes in a field", self.size_B, [(n * nbits + 7) // 8 for n in count_B])
    plane = np.unpackbits(np.frombuffer(self.data, np.uint8), bitorder="little")
    both = zip(self.start_B, count_B, strict=True)
    bits = [plane[8 * start : 8 * start + n * nbits] for start, n in both]
    bits_VW = (bits[0] if len(bits) == 1 else np.concatenate(bits)).reshape(sum(count_B), nbits)
    return (bits_VW.astype(np.float32) @ POWERS[:nbits]).astype(np.uint32)

  def unpack_widths(
    self, nbits: np.ndarray, count_B: list[int], after_B: list[int] | None = None
  ) -> np.ndarray:
    """Unpacks values that `pack` packed into a number of bits each, as uint32.

    Args:
      nbits: uint32, the number of bits of each value of all records, at most 32.
      count_B: Number of values of each record.
      after_B: Number of bytes of each record that follow its values; None for none.

    Raises:
      InputError: The bytes of a record have the wrong length for its values.
    """
    ends = np.zeros(len(nbits) + 1, np.uint64)  # the end of value i is at index i + 1
    np.cumsum(nbits, out=ends[1:])
    at, edges = ends[:-1], ends[[*numbers.starts(count_B), len(nbits)]].tolist()
    bytes_B = [(b - a + 7) // 8 for a, b in itertools.pairwise(edges)]
    if after_B:
      bytes_B = [a + b for a, b in zip(bytes_B, after_B, strict=True)]
    numbers.whole("bytes in a field", self.size_B, bytes_B)
    if len(count_B) > 1:  # every record begins at a byte
      moved = [8 * start - edge for start, edge in zip(self.start_B, edges, strict=False)]
      at += np.repeat(np.array(moved, np.uint64), count_B)
    words = np.frombuffer(self.data + bytes(8 - len(self.data) % 4), "<u4").astype(np.uint64)
    pairs = words[1:] << np.uint64(32)
    pairs |= words[:-1]
    values = pairs[(at >> np.uint64(5)).view(np.int64)]
    at &= np.uint64(31)
    values >>= at
    out = values.astype(np.uint32)
    too_high = np.uint32(0xFFFFFFFF) << nbits  # 0 after a shift by 32
    out &= np.invert(too_high, out=too_high)
    return out

  def ones(self, noun: str, count_B: list[int]) -> np.ndarray:
    """Returns the positions of the ones of unary planes, int64, in bits from the first byte.

    Args:
      noun: What a one marks, for the message.
      count_B: Number of ones of each record.

    Raises:
      InputError: A record has another number of ones.
    """
    plane = np.unpackbits(np.frombuffer(self.data, np.uint8), bitorder="little")
    place = np.flatnonzero(plane.view(bool))
    found_B = [len(place)]
    if len(count_B) > 1:
      edges = np.searchsorted(place, [8 * start for start in self.start_B]).tolist()
      found_B = [b - a for a, b in itertools.pairwise([*edges, len(place)])]
    numbers.whole(noun, found_B, count_B)
    return place


POWERS = np.exp2(np.arange(24, dtype=np.float32))  # sums of different ones are exact in float32


def join(records: Sequence[Mapping[str, bytes]]) -> dict[str, Joined]:
  """Returns each field of some records."""
  return {name: Joined.of([fields[name] for fields in records]) for name in records[0]}
