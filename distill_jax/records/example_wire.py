"""Encoding of a tf.train.Example whose features are single byte strings, without protobuf.

The nested messages, in protobuf's terms:

  Example {1: Features {1: entry {1: key, 2: Feature {1: BytesList {1: value}}}, 1: entry ...}}

Each field is a tag (number << 3 | wire type, here always 0x0A or 0x12), the length as a varint, and
that number of bytes. Entries are sorted by key, as in deterministic protobuf.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from distill_jax.errors import InputError
from distill_jax.records.bits import Joined, join

FIRST, SECOND = b"\x0a", b"\x12"  # tags of fields 1 and 2 with a length
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5  # wire types
Span = tuple[int, int]


def serialize(features: Mapping[str, bytes]) -> bytes:
  """Returns the bytes of an Example with these features."""
  entries = []
  for key, value in sorted((name.encode(), value) for name, value in features.items()):
    feature = _field(FIRST, _field(FIRST, value))
    entries.append(_field(FIRST, _field(FIRST, key) + _field(SECOND, feature)))
  return _field(FIRST, b"".join(entries)) if entries else b""


def parse(data: bytes) -> dict[str, bytes]:
  """Returns the first byte string of each feature of an Example, by name.

  Unknown fields are skipped, as in protobuf.

  Raises:
    InputError: The bytes are not an Example, or a feature is not a byte string.
  """
  if (spans := _plain_spans(data)) is not None:
    return {name: data[start:end] for name, (start, end) in spans.items()}
  features = {}
  for example in _messages(data, (0, len(data)), 1):
    for entry in _messages(data, example, 1):
      key, value = _entry(data, entry)
      features[key] = value
  return features


def parse_many(records: Sequence[bytes]) -> dict[str, Joined]:
  """Returns the first byte string of each feature of some Examples, by name, as `parse` does.

  Examples whose features have equal sizes are parsed at once.

  Raises:
    InputError: See `parse`; or the Examples have different features.
  """
  size, count = len(records[0]), len(records)
  if count > 1 and all(len(data) == size for data in records):
    spans = _plain_spans(records[0]) or {}
    bytes_BL = np.frombuffer(b"".join(records), np.uint8).reshape(count, size)
    is_value = np.zeros(size, bool)
    for start, end in spans.values():
      is_value[start:end] = True
    if spans and (bytes_BL[:, ~is_value] == bytes_BL[0, ~is_value]).all():
      return {name: Joined.of_rows(bytes_BL[:, a:b]) for name, (a, b) in spans.items()}
  parsed = [parse(data) for data in records]
  if any(features.keys() != parsed[0].keys() for features in parsed):
    raise InputError("Some records have other features than others.")
  return join(parsed)


def _plain_spans(data: bytes) -> dict[str, Span] | None:
  """Returns the span of each feature of bytes in the layout of `serialize`; None for another."""
  spans, at, end = {}, 0, len(data)
  try:
    size, at = _varint(data, 1, end)
    if data[0] != FIRST[0] or at + size != end:
      return None
    while at < end:
      entry = at
      size, at = _varint(data, entry + 1, end)
      after, key, value = at + size, at + 2, at + 2 + data[at + 1]
      if data[entry] != FIRST[0] or data[at] != FIRST[0] or data[at + 1] > 0x7F or after > end:
        return None
      name = data[key:value].decode()
      for tag in (SECOND[0], FIRST[0], FIRST[0]):  # Feature, BytesList and value, nested
        if data[value] != tag:
          return None
        size, value = _varint(data, value + 1, end)
        if value + size != after:
          return None
      spans[name] = value, after
      at = after
  except (IndexError, InputError, UnicodeDecodeError):
    return None
  return spans


def _entry(data: bytes, entry: Span) -> tuple[str, bytes]:
  key, value = b"", None
  for number, (start, end) in _fields(data, entry):
    if number == 1:
      key = data[start:end]
    elif number == 2:
      value = _first_bytes(data, (start, end))
  try:
    name = key.decode()
  except UnicodeDecodeError as e:
    raise InputError("The name of a feature is not UTF-8.") from e
  if value is None:
    raise InputError(f"Feature {name!r} is not a byte string.")
  return name, value


def _first_bytes(data: bytes, feature: Span) -> bytes | None:
  for bytes_list in _messages(data, feature, 1):
    for start, end in _messages(data, bytes_list, 1):
      return data[start:end]
  return None


def _messages(data: bytes, span: Span, wanted: int) -> Iterator[Span]:
  """Yields the spans of the contents of fields with a number."""
  return (inside for number, inside in _fields(data, span) if number == wanted)


def _fields(data: bytes, span: Span) -> Iterator[tuple[int, Span]]:
  """Yields (number, span of the contents) of each field with a length."""
  at, end = span
  while at < end:
    tag, at = _varint(data, at, end)
    number, wire = tag >> 3, tag & 7
    if wire == LENGTH:
      size, at = _varint(data, at, end)
      if size > end - at:
        raise InputError("A field is longer than its message.")
      if not number:
        raise InputError("A field has the number 0.")
      yield number, (at, at + size)
      at += size
    elif wire == VARINT:
      _, at = _varint(data, at, end)
    elif wire in (FIXED64, FIXED32):
      at += 8 if wire == FIXED64 else 4
      if at > end:
        raise InputError("A number is cut off.")
    else:
      raise InputError(f"A field has the wire type {wire}, which an Example does not use.")


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
  """Returns (number, index after it)."""
  if at < end and data[at] < 0x80:
    return data[at], at + 1
  value = shift = 0
  while True:
    if at >= end or shift > 63:
      raise InputError("A length is cut off.")
    byte = data[at]
    at += 1
    value |= (byte & 0x7F) << shift
    if byte < 0x80:
      return value, at
    shift += 7


def _field(tag: bytes, contents: bytes) -> bytes:
  size, head = len(contents), bytearray(tag)
  while size > 0x7F:
    head.append(size & 0x7F | 0x80)
    size >>= 7
  head.append(size)
  return bytes(head) + contents
