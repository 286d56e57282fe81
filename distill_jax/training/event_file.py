"""Event files of TensorBoard with scalars by step, without protobuf.

tensorboardX writes the same files, but it imports torch where that is installed, which takes more
CPU time than jax, flax, optax and orbax together. A file is a sequence of framed messages:

  length (8 bytes), its checksum (4), message, its checksum (4)

The messages, in protobuf's terms (tensorflow/core/util/event.proto and framework/summary.proto):

  Event {1: double wall_time, 2: int64 step, 3: string file_version, 5: Summary, 7: SessionLog}
  Summary {1: Value {1: string tag, 2: float simple_value}, 1: Value ...}
  SessionLog {1: status}
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from distill_jax.records.example_wire import encode_field, encode_varint

VERSION = b"brain.Event:2"  # of the format, in the first event of a file
WALL_TIME, STEP, FILE_VERSION, SUMMARY, SESSION_LOG = b"\x09", b"\x10", b"\x1a", b"\x2a", b"\x3a"
VALUE, TAG, SIMPLE_VALUE = b"\x0a", b"\x0a", b"\x15"
START = b"\x08\x01"  # a SessionLog with status 1
CASTAGNOLI = 0x82F63B78  # the polynomial of CRC-32C, lowest bit first


class EventFile:
  """A new event file. Each event is flushed, so that TensorBoard shows it at once.

  Args:
    folder: The folder of the file.
    purge_step: TensorBoard forgets what earlier files in the folder have from this step on; None:
      nothing.
  """

  def __init__(self, folder: Path, purge_step: int | None = None):
    now = time.time_ns()  # TensorBoard reads files in the order of their names
    name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}"
    self._file = (folder / name).open("xb")
    self._write(0, encode_field(FILE_VERSION, VERSION))
    if purge_step is not None:
      self._write(purge_step, encode_field(SESSION_LOG, START))

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes the values of a step, rounded to float32, by name."""
    with np.errstate(over="ignore"):  # a larger number becomes infinity
      numbers = np.array(list(values.values())).astype("<f4")
    summary = b"".join(
      encode_field(VALUE, encode_field(TAG, name.encode()) + SIMPLE_VALUE + number.tobytes())
      for name, number in zip(values, numbers, strict=True)
    )
    self._write(step, encode_field(SUMMARY, summary))

  def _write(self, step: int, field: bytes) -> None:
    event = WALL_TIME + struct.pack("<d", time.time()) + STEP + encode_varint(step) + field
    length = struct.pack("<Q", len(event))
    self._file.write(length + _checksum(length) + event + _checksum(event))
    self._file.flush()

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


def _table() -> list[int]:
  """Returns the CRC-32C of each byte."""
  crcs = list(range(256))
  for _ in range(8):
    crcs = [crc >> 1 ^ (CASTAGNOLI if crc & 1 else 0) for crc in crcs]
  return crcs


TABLE = _table()


def _checksum(data: bytes) -> bytes:
  """Returns the masked CRC-32C of TensorFlow's TFRecord format."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc = crc >> 8 ^ TABLE[(crc ^ byte) & 0xFF]
  crc ^= 0xFFFFFFFF
  masked = (crc >> 15 | crc << 17) + 0xA282EAD8
  return struct.pack("<I", masked & 0xFFFFFFFF)
