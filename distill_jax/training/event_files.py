"""Event files of scalars, which TensorBoard reads.

An event file consists of frames: the length of a message as uint64, the checksum of the length, the
message, and the checksum of the message. The messages are protocol buffers (event.proto and
summary.proto of TensorFlow). The few fields that scalars need are encoded here: packages that write
event files import torch or TensorFlow if it is installed, which takes seconds at each start.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

VARINT, DOUBLE, BYTES, FLOAT = 0, 1, 2, 5  # types of fields
POLYNOMIAL = 0x82F63B78  # of CRC-32C, with its bits reversed


class EventFile:
  """A new event file, to which scalars are written.

  Args:
    folder: The folder of the file.
    purge_step: TensorBoard forgets the scalars of older files from this step on. None: none.
  """

  def __init__(self, folder: Path, purge_step: int | None = None):
    now = time.time_ns()  # files of the same second have different names
    name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}"
    self._file = (folder / name).open("xb")
    self._add(_field(3, b"brain.Event:2"))
    if purge_step is not None:
      session_start = _field(1, 1)
      self._add(_field(2, purge_step) + _field(7, session_start))

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes the scalars of a step."""
    values = (_field(1, _field(1, name.encode()) + _field(2, x)) for name, x in scalars.items())
    self._add(_field(2, step) + _field(5, b"".join(values)))

  def close(self) -> None:
    """Closes the file."""
    self._file.close()

  def _add(self, fields: bytes) -> None:
    """Appends an event with the current time."""
    message = _tag(1, DOUBLE) + struct.pack("<d", time.time()) + fields
    length = struct.pack("<Q", len(message))
    self._file.write(length + _checksum(length) + message + _checksum(message))
    self._file.flush()


def _field(number: int, value: int | float | bytes) -> bytes:
  """Returns a field of a message: an integer, a float of 32 bits, or bytes."""
  if isinstance(value, int):
    return _tag(number, VARINT) + _varint(value)
  if isinstance(value, float):
    with np.errstate(over="ignore"):  # a larger number becomes infinity
      return _tag(number, FLOAT) + np.float32(value).astype("<f4").tobytes()
  return _tag(number, BYTES) + _varint(len(value)) + value


def _tag(number: int, kind: int) -> bytes:
  return _varint(number << 3 | kind)


def _varint(x: int) -> bytes:
  """Returns a non-negative integer with seven bits per byte, the lowest first."""
  out = bytearray()
  while x > 0x7F:
    out.append(x & 0x7F | 0x80)
    x >>= 7
  return bytes([*out, x])


def _checksum(data: bytes) -> bytes:
  """Returns the CRC-32C of data, rotated and shifted as the format of TFRecords wants it."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc = CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
  crc ^= 0xFFFFFFFF
  return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _crc_table() -> list[int]:
  """Returns the CRC of each byte."""
  table = list(range(256))
  for _ in range(8):
    table = [crc >> 1 ^ (POLYNOMIAL if crc & 1 else 0) for crc in table]
  return table


CRC_TABLE = _crc_table()
