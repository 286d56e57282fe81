"""Reading JSON with errors that name the file and the problem, and writing JSON files."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_jax.errors import InputError
from distill_jax.runtime import files
from distill_jax.runtime.atomic_io import atomic_write

if TYPE_CHECKING:  # reading a store must not import jax
  from distill_jax.types import JsonObject

GZIP = b"\x1f\x8b"  # the first bytes of a file
_SURROGATE = re.compile("[\ud800-\udfff]")


def decode_utf8(raw: bytes, offset: int = 0, action: str = "") -> str:
  """Decodes UTF-8.

  Args:
    raw: The bytes.
    offset: The offset of the first byte in its file, for the error.
    action: What the user should do about invalid bytes, as an imperative without a full stop; "" to
      convert or unpack the file.

  Raises:
    InputError: If the bytes are not UTF-8. The message names the first invalid byte but no file.
  """
  try:
    return raw.decode()
  except UnicodeDecodeError as e:
    problem = f"Byte {offset + e.start} is 0x{raw[e.start]:02x}, which is not UTF-8"
    correct = "Convert the file to UTF-8"
    if not offset and raw.startswith(GZIP):
      problem, correct = "The file is compressed with gzip", "Unpack it"
    raise InputError(f"{problem}. {action or correct}.") from e


def lone_surrogate(text: str) -> str | None:
  """Returns the first half of a surrogate pair in a text, or None.

  JSON can spell one ("\\ud800"); it is not a character and has no UTF-8.
  """
  match = _SURROGATE.search(text)
  return match[0] if match else None


def parse(
  text: bytes | str, subject: str = "The text", action: str = "", unique_keys: bool = False
) -> Any:
  """Parses a JSON value.

  Args:
    text: str, or bytes in UTF-8.
    subject: The subject of the error message, as in "SUBJECT is not JSON."
    action: The advice at the end of the error message, as an imperative without a full stop. "":
      no advice.
    unique_keys: True to refuse an object with a repeated key. Otherwise, the last value is used.

  Raises:
    InputError: If the text is not JSON or not UTF-8 (`__cause__` is the parser's error), or if a
      key is repeated.
  """

  def unique(pairs: list[tuple[str, Any]]) -> JsonObject:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
      twice = next(key for key in keys if keys.count(key) > 1)
      raise InputError(_message(f"{subject} has the key {twice!r} twice", action))
    return dict(pairs)

  try:
    decoded = text.decode() if isinstance(text, bytes) else text
    return json.loads(decoded, object_pairs_hook=unique if unique_keys else None)
  except InputError:
    raise
  except (ValueError, RecursionError) as e:  # ValueError: not UTF-8, or a number of 5000 digits
    raise InputError(_message(f"{subject} is not JSON ({e})", action)) from e


def parse_object(
  text: bytes | str, subject: str = "The text", action: str = "", unique_keys: bool = False
) -> JsonObject:
  """Parses one JSON object; see `parse` for the arguments.

  Raises:
    InputError: See `parse`; or if the JSON value is not an object.
  """
  value = parse(text, subject, action, unique_keys)
  if not isinstance(value, dict):
    problem = f"{subject} is a JSON {type(value).__name__}; expected one object {{...}}"
    raise InputError(_message(problem, action))
  return value


def _message(problem: str, action: str) -> str:
  return f"{problem}. {action[0].upper()}{action[1:]}." if action else f"{problem}."


def read_object(path: str | os.PathLike[str], action: str, unique_keys: bool = False) -> JsonObject:
  """Reads the JSON object in a file.

  Args:
    path: The path or URL of the file.
    action: The advice if the file is missing or damaged, e.g. "Run the step that writes it".
    unique_keys: See `parse`.

  Raises:
    InputError: If the file does not exist or does not contain a JSON object.
  """
  if files.info(path) is None:
    raise InputError(_message(f"{path} does not exist", action))
  return parse_object(files.read(path), str(path), action, unique_keys)


def write_json(
  path: Path,
  tree: Any,
  *,
  indent: int = 1,
  sort_keys: bool = True,
  ensure_ascii: bool = True,
) -> None:
  """Writes a tree of plain values to a JSON file, atomically."""
  text = json.dumps(tree, indent=indent, sort_keys=sort_keys, ensure_ascii=ensure_ascii)
  atomic_write(path, text + "\n")


def write_json_once(path: Path, tree: Any) -> None:
  """Writes a tree of plain values to a JSON file, on process 0 only, for all to read.

  Raises:
    InputError: If the first process cannot write it; raised on all processes.
  """
  from distill_jax.runtime import distributed, storage  # imports jax

  distributed.run_on_process_0(lambda: write_json(path, tree))
  storage.share(path)
