"""Reading and writing JSON lines: files with one JSON value per line."""

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
    raw: The line's bytes, including the line end.
    file: The file.
    number: The line's number in the file, from 1.
    offset: The offset of the line's first byte in the file.
  """

  raw: bytes
  file: Path
  number: int
  offset: int

  @property
  def where(self) -> str:
    """The file and the line number, for messages: "FILE, line 3"."""
    return f"{self.file}, line {self.number}"

  def text(self) -> str:
    """Returns the line as text, including the line end.

    Raises:
      InputError: If the line is not UTF-8.
    """
    try:
      return json_io.decode_utf8(self.raw, self.offset)
    except InputError as e:
      raise InputError(f"{self.file}: {e} Convert the file to UTF-8.") from e

  def object(self) -> JsonObject:
    """Returns the JSON object on the line.

    Raises:
      InputError: If the line is not UTF-8 or not a JSON object.
    """
    return parse_object(self.text(), self.where)


def read_lines(*files: Path, skip_bom: bool = False) -> Iterator[Line]:
  """Yields the lines of files in order, except blank lines.

  Args:
    files: The files.
    skip_bom: True to skip a UTF-8 byte order mark at the start of a file. Otherwise it is part of
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


def parse_object(text: str, where: str = "The line") -> JsonObject:
  """Returns the JSON object on a line.

  Args:
    text: The line.
    where: The subject of the error message, e.g. the line's place.

  Raises:
    InputError: If the line is not a JSON object.
  """
  return json_io.parse_object(text, where, "Correct the line")


def to_line(value: Any, ensure_ascii: bool = False) -> bytes:
  """Returns a value as one line of JSON.

  Args:
    value: A tree of plain values.
    ensure_ascii: True to escape characters that are not ASCII. A value with half a surrogate pair,
      which UTF-8 cannot encode, is always escaped.
  """
  try:
    return json.dumps(value, ensure_ascii=ensure_ascii).encode() + b"\n"
  except UnicodeEncodeError:
    return json.dumps(value).encode() + b"\n"


def write(path: Path, values: Iterable[Any], ensure_ascii: bool = False) -> None:
  """Writes a file with one line per value (see `to_line`), atomically."""
  atomic_write(path, b"".join(to_line(value, ensure_ascii) for value in values))
