"""JSON: parsed with errors that name what is wrong, read from files and written to them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from distill_jax.errors import InputError
from distill_jax.runtime import distributed
from distill_jax.runtime.atomic_io import atomic_write
from distill_jax.types import JsonObject

_SURROGATE = re.compile("[\ud800-\udfff]")


def decode_utf8(raw: bytes, offset: int = 0) -> str:
  """Decodes UTF-8.

  Args:
    raw: the bytes.
    offset: the place of their first byte in the file, for the error.

  Raises:
    InputError: they are not UTF-8. The text speaks of the byte alone: the caller knows the file.
  """
  try:
    return raw.decode()
  except UnicodeDecodeError as e:
    raise InputError(f"byte {offset + e.start} is 0x{raw[e.start]:02x}, which is not UTF-8") from e


def lone_surrogate(text: str) -> str | None:
  """Returns the first half of a surrogate pair in a text, or None.

  JSON can spell one ("\\ud800"); it is not a character and has no UTF-8.
  """
  match = _SURROGATE.search(text)
  return match[0] if match else None


def parse(text: bytes | str, subject: str = "", action: str = "", unique_keys: bool = False) -> Any:
  """Parses JSON of any kind.

  Args:
    text: str, or bytes in UTF-8.
    subject: what the error is about, as in "SUBJECT is not JSON"; "": the error begins with
      "not JSON", for a caller that puts a place and a colon before it.
    action: what the error tells the reader to do; "": nothing.
    unique_keys: refuses an object that has a key twice, of which the last counts otherwise.

  Raises:
    InputError: the text is not JSON or not UTF-8 (`__cause__` is the parser's own error), or a
      key is there twice.
  """

  def unique(pairs: list[tuple[str, Any]]) -> JsonObject:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
      twice = next(key for key in keys if keys.count(key) > 1)
      named = f"{subject} names {twice!r} twice" if subject else f"{twice!r} is named twice"
      raise InputError(_sentence(named, action))
    return dict(pairs)

  try:
    decoded = text.decode() if isinstance(text, bytes) else text
    return json.loads(decoded, object_pairs_hook=unique if unique_keys else None)
  except InputError:
    raise
  except (ValueError, RecursionError) as e:  # ValueError: not UTF-8, or a number of 5000 digits
    raise InputError(_sentence(_predicate(subject, f"not JSON ({e})"), action)) from e


def parse_object(
  text: bytes | str, subject: str = "", action: str = "", unique_keys: bool = False
) -> JsonObject:
  """Parses one JSON object; arguments and errors are those of `parse`.

  Raises:
    InputError: as `parse` does, or the text is JSON and not an object.
  """
  value = parse(text, subject, action, unique_keys)
  if not isinstance(value, dict):
    problem = _predicate(subject, f"a JSON {type(value).__name__}")
    raise InputError(_sentence(problem, "expected one object {...}", action))
  return value


def _predicate(subject: str, predicate: str) -> str:
  return f"{subject} is {predicate}" if subject else predicate


def _sentence(*parts: str) -> str:
  return "; ".join(filter(None, parts))


def read_object(path: Path, action: str, unique_keys: bool = False) -> JsonObject:
  """Reads the JSON object in a file.

  Args:
    path: the file.
    action: what to do where it is missing or damaged, such as "run the step that writes it".
    unique_keys: see `parse_object`.

  Raises:
    InputError: the file is missing, or holds no JSON object.
  """
  if not path.is_file():
    raise InputError(f"{path} is not there; {action}")
  return parse_object(path.read_bytes(), str(path), action, unique_keys)


def write_json(
  path: Path,
  tree: Any,
  *,
  indent: int = 1,
  sort_keys: bool = True,
  ensure_ascii: bool = True,
) -> None:
  """Writes a tree of plain values as JSON, whole or not at all."""
  text = json.dumps(tree, indent=indent, sort_keys=sort_keys, ensure_ascii=ensure_ascii)
  atomic_write(path, text + "\n")


def write_json_once(path: Path, tree: Any) -> None:
  """Writes a tree of plain values as JSON, on the first process alone.

  Raises:
    InputError: on all processes, if the first one cannot write it.
  """
  distributed.run_on_process_0(lambda: write_json(path, tree))
