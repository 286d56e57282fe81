"""JSON lines: files with one JSON value on each line, read with places for errors and written."""

from __future__ import annotations

import codecs
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from distill_jax.errors import InputError
from distill_jax.runtime import json_io
from distill_jax.runtime.atomic_io import atomic_write
from distill_jax.types import JsonObject


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
  """One line of a file.

  Attributes:
    raw: its bytes, the line end included.
    file: the file.
    number: its number in the file, from 1.
    offset: the place of its first byte in the file.
  """

  raw: bytes
  file: Path
  number: int
  offset: int

  @property
  def where(self) -> str:
    """The line's place, for errors."""
    return f"{self.file}, line {self.number}"

  def text(self) -> str:
    """Returns the line as text, line end included.

    Raises:
      InputError: it is not UTF-8; the error names the byte's place in the file.
    """
    try:
      return json_io.decode_utf8(self.raw, self.offset)
    except InputError as e:
      raise InputError(f"{self.file}: {e}; convert the file to UTF-8") from e

  def object(self) -> JsonObject:
    """Returns the JSON object on the line.

    Raises:
      InputError: there is none; the error begins with the line's place.
    """
    return parse_object(self.text(), self.where)


def read_lines(*files: Path, skip_bom: bool = False) -> Iterator[Line]:
  """Yields the lines of files that are not blank, in order. Nothing is decoded.

  Args:
    skip_bom: leaves out a UTF-8 byte order mark at the start of a file. Otherwise it is part of
      the first line, which then is not JSON.
  """
  for file in files:
    with file.open("rb") as lines:
      offset = 0
      if skip_bom and lines.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
        offset = len(codecs.BOM_UTF8)
      lines.seek(offset)
      for number, raw in enumerate(lines, 1):
        if raw.strip():
          yield Line(raw, file, number, offset)
        offset += len(raw)


def parse_object(text: str, where: str = "") -> JsonObject:
  """Returns the JSON object on a line.

  Args:
    text: the line.
    where: its place, with which the error begins; "": the caller adds it.

  Raises:
    InputError: the line is not JSON, or not an object.
  """
  try:
    return json_io.parse_object(text, action="mend the line")
  except InputError as e:
    raise InputError(f"{where}: {e}" if where else str(e)) from e.__cause__


def to_line(value: Any, ensure_ascii: bool = False) -> bytes:
  """Returns a value as one line of JSON.

  Args:
    value: plain values.
    ensure_ascii: escape what is not ASCII. A value with half a surrogate pair, which UTF-8
      cannot hold, is always written so.
  """
  try:
    return json.dumps(value, ensure_ascii=ensure_ascii).encode() + b"\n"
  except UnicodeEncodeError:
    return json.dumps(value).encode() + b"\n"


def write(path: Path, values: Iterable[Any], ensure_ascii: bool = False) -> None:
  """Writes a file with a line for each value (see `to_line`), whole or not at all."""
  atomic_write(path, b"".join(to_line(value, ensure_ascii) for value in values))
