"""The index of a shard, with which a record is one range read of a local file or a URL.

An ArrayRecord file is a sequence of chunks, and a header of 24 bytes begins at each multiple of
65,536 bytes, also within a chunk. An uncompressed chunk of one record ends with the bytes of the
record. The index, `records-NNNNN.index`, holds for each record the range of bytes of the file in
which the record lies, block headers included, and the checksum of the record without them. It takes
16 bytes per record, i.e. 0.01 % of a record of 129 KB.

Stores whose records share compressed chunks (see `has_index`) have no indices: their shards are
small and are read as a whole.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from array_record.python import array_record_module

from distill_jax.runtime import files

LONG = 8  # positions of a record from which on each record has its own chunk
MAGIC, VERSION = b"DJIX", 1
HEADER = struct.Struct("<4sIII")  # magic, version, number of records, crc32 of the entries
ENTRY = np.dtype([("offset", "<u8"), ("length", "<u4"), ("crc32", "<u4")])
BLOCK, BLOCK_HEADER, CHUNK_HEADER = 2**16, 24, 40  # sizes in bytes, of array_record's files
AT_ONCE = 16  # records that `build` holds in memory


def has_index(seq_len: int) -> bool:
  """Returns True if the shards of records of `seq_len` positions have indices."""
  return seq_len >= LONG


def name_of(shard: str) -> str:
  """Returns the name of the index of a shard, given the shard's name."""
  return shard.removesuffix(".array_record") + ".index"


def size_of(count: int) -> int:
  """Returns the size in bytes of the index of `count` records."""
  return HEADER.size + count * ENTRY.itemsize


def place_of(number: int) -> tuple[int, int]:
  """Returns where the entry of a record begins and ends in the index of its shard."""
  start = size_of(number)
  return start, start + ENTRY.itemsize


def build(path: Path, count: int) -> np.ndarray:
  """Returns the entries of the index of a local shard, each compared with array_record's record.

  Args:
    path: The shard, with one record per chunk.
    count: Number of records that it must hold.

  Raises:
    ValueError: The shard is damaged, or is laid out in another way.
  """
  entries = np.zeros(count, ENTRY)
  at = CHUNK_HEADER  # after the chunk that marks the beginning of a file
  with files.open_read(path) as f:
    for i, record in enumerate(_records(path, count)):
      size = int.from_bytes(_read(f, at, CHUNK_HEADER)[8:16], "little")
      at += CHUNK_HEADER + size
      if size <= len(record) or _read(f, at - len(record), len(record)) != record:
        raise ValueError(f"Record {i} is not at the end of an uncompressed chunk.")
      start, stop = _place(at - len(record)), _place(at - 1) + 1
      entries[i] = start, stop - start, zlib.crc32(record)
  return entries


def open_shard(path: Path, count: int) -> array_record_module.ArrayRecordReader:
  """Returns array_record's reader of a local shard of `count` records.

  Raises:
    ValueError: The shard is damaged or holds another number of records.
    InputError: The file cannot be opened, e.g. because too many are open.
  """
  try:
    reader = array_record_module.ArrayRecordReader(str(path), "readahead_buffer_size:0")
    found = reader.num_records() if reader.ok() else 0
  except RuntimeError as e:
    raise ValueError(f"The file cannot be opened, {e}") from e
  if found != count:
    files.open_read(path).close()  # array_record does not tell if too many files are open
    raise ValueError(f"The file holds {found} records; expected {count}.")
  return reader


def to_bytes(entries: np.ndarray) -> bytes:
  """Returns the contents of an index file."""
  data = entries.tobytes()
  return HEADER.pack(MAGIC, VERSION, len(entries), zlib.crc32(data)) + data


def parse(data: bytes, count: int) -> np.ndarray:
  """Returns the entries of an index file.

  Args:
    data: The contents of the file.
    count: Number of records of the shard.

  Raises:
    ValueError: The file is damaged, or is of another shard or version.
  """
  if len(data) != size_of(count):
    raise ValueError(f"The index has {len(data)} bytes; expected {size_of(count)}.")
  magic, version, found, crc32 = HEADER.unpack_from(data)
  if (magic, version, found) != (MAGIC, VERSION, count):
    raise ValueError(
      f"The index begins with {magic!r}, version {version} and {found} records; expected "
      f"{MAGIC!r}, version {VERSION} and {count} records."
    )
  if zlib.crc32(data[HEADER.size :]) != crc32:
    raise ValueError("The checksum of the index differs.")
  return np.frombuffer(data, ENTRY, offset=HEADER.size)


def record_of(data: bytes, entry: np.void) -> bytes:
  """Returns a record, given the bytes of the range of its entry.

  Raises:
    ValueError: The checksum differs.
  """
  record = _without_block_headers(data, int(entry["offset"]))
  if zlib.crc32(record) != entry["crc32"]:
    raise ValueError("The checksum of the record differs from the index.")
  return record


def _records(path: Path, count: int) -> Iterator[bytes]:
  """Yields the records of a shard, whose checksums array_record compares."""
  reader = open_shard(path, count)
  try:
    for first in range(0, count, AT_ONCE):
      yield from reader.read(range(first, min(first + AT_ONCE, count)))
  except (RuntimeError, IndexError) as e:
    raise ValueError(str(e).split(";")[0]) from e
  finally:
    reader.close()


def _place(at: int) -> int:
  """Returns the position in the file of a byte, given its position among the chunks' bytes."""
  block, within = divmod(at, BLOCK - BLOCK_HEADER)
  return block * BLOCK + BLOCK_HEADER + within


def _read(f: BinaryIO, at: int, size: int) -> bytes:
  """Returns `size` bytes of the chunks from position `at` on."""
  start, stop = _place(at), _place(at + size - 1) + 1
  f.seek(start, os.SEEK_SET)
  return _without_block_headers(f.read(stop - start), start)


def _without_block_headers(data: bytes, offset: int) -> bytes:
  """Returns the bytes of chunks in a range of the file that begins at `offset`."""
  first = -offset % BLOCK
  if first >= len(data):
    return data
  view = memoryview(data)
  later = (view[i + BLOCK_HEADER : i + BLOCK] for i in range(first, len(data), BLOCK))
  return b"".join([view[:first], *later])
