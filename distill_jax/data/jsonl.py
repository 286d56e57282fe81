"""Reading and writing JSON lines: files with one JSON value per line."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from distill_jax.errors import InputError
from distill_jax.runtime import files as file_io
from distill_jax.runtime import json_io
from distill_jax.runtime.atomic_io import atomic_write
from distill_jax.runtime.files import FileInfo

if TYPE_CHECKING:  # the workers of `pack` must not import jax
  from distill_jax.types import JsonObject


GZIP = ".gz"  # the end of the names of compressed files
SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
  """One line of a file.

  Attributes:
    raw: The line's bytes, including the line end.
    file: The file's path or URL.
    number: The line's number in the file, from 1.
    offset: The offset of the line's first byte in the file, of a compressed one in its contents.
  """

  raw: bytes
  file: str | os.PathLike[str]
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
      raise InputError(f"{self.file}: {e}") from e

  def object(self) -> JsonObject:
    """Returns the JSON object on the line.

    Raises:
      InputError: If the line is not UTF-8 or not a JSON object.
    """
    return parse_object(self.text(), self.where)


def read_lines(*files: str | os.PathLike[str], skip_bom: bool = False) -> Iterator[Line]:
  """Yields the lines of files in order, except blank lines. One file is open at a time.

  Args:
    files: The paths or URLs of the files.
    skip_bom: True to skip a UTF-8 byte order mark at the start of a file. Otherwise it is part of
      the first line, which then is not JSON.

  Raises:
    InputError: If a file does not exist or cannot be read.
  """
  for file in files:
    with open_file(file) as stream:
      yield from split_lines(stream, file, skip_bom=skip_bom)


@contextlib.contextmanager
def open_file(file: str | os.PathLike[str]) -> Iterator[BinaryIO | gzip.GzipFile]:
  """A context manager that yields the contents of a file, unpacked if its name ends in ".gz".

  Args:
    file: The path or URL of the file. A compressed one is read from its start at every `seek`.

  Raises:
    InputError: If the file does not exist or cannot be read.
  """
  with file_io.open_read(file) as stream:
    if not str(file).endswith(GZIP):
      yield stream
      return
    try:
      with gzip.open(stream) as unpacked:
        yield unpacked
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
      reason = str(e).rstrip(".")
      raise InputError(f"{file} is not a whole gzip file ({reason}). Copy it again.") from e


def split_lines(
  raw: Iterable[bytes],
  file: str | os.PathLike[str],
  number: int = 1,
  offset: int = 0,
  skip_bom: bool = False,
) -> Iterator[Line]:
  """Yields the lines of a part of a file, except blank lines.

  Args:
    raw: The bytes of each line, e.g. a binary stream.
    file: The file's path or URL.
    number: The number of the first line.
    offset: The offset of the first line in the file.
    skip_bom: See `read_lines`.
  """
  for line in raw:
    if skip_bom and not offset and line.startswith(codecs.BOM_UTF8):
      offset, line = len(codecs.BOM_UTF8), line.removeprefix(codecs.BOM_UTF8)
    if line.strip():
      yield Line(line, file, number, offset)
    number, offset = number + 1, offset + len(line)


def find_files(path: str, suffixes: tuple[str, ...] = SUFFIXES) -> dict[str, FileInfo]:
  """Returns the named file, or the files with a suffix that are directly in the named folder.

  Args:
    path: The path or URL of a file or folder.
    suffixes: The suffixes of the files in a folder.

  Raises:
    InputError: If the path does not exist, or the folder has no such files, or a file twice.
  """
  if (one := file_io.info(path)) is not None:
    return {path: one}
  listed = file_io.listing(path)
  if found := {name: info for name, info in listed.items() if name.endswith(suffixes)}:
    if twice := [name for name in found if name + GZIP in found]:
      raise InputError(f"{path} holds {twice[0]} and {twice[0]}{GZIP}. Remove one of them.")
    return {file_io.join(path, name): info for name, info in found.items()}
  if listed or (not file_io.is_remote(path) and Path(path).is_dir()):
    raise InputError(f"{path} is a folder without {suffixes[0]} files. Name another folder.")
  raise InputError(f"{path} does not exist. Name a {suffixes[0]} file or a folder of them.")


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
