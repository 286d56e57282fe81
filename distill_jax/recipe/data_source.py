"""Recognises the data that --data names, by looking at it, and prepares it where necessary."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from distill_jax.data import jsonl, sources
from distill_jax.data.options import DataOptions
from distill_jax.errors import InputError, bad_value
from distill_jax.recipe import beginning
from distill_jax.runtime import files, json_io
from distill_jax.types import JsonObject

EXPECTED = "a text file, a folder of text files, or JSON lines"
DOCUMENTS = "documents.jsonl"  # the prepared file
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text", ".tex")
PAIRS = tuple(
  itertools.product(
    ("prompt", "instruction", "question", "input"), ("completion", "response", "output", "answer")
  )
)
FEW = 20  # documents: fewer are cut into parts, so that some can be held out
LOOKED_AT = 100  # lines of a JSONL file
MIN_PART, MAX_PART = 500, 20_000  # characters of a part of a document


@dataclasses.dataclass(frozen=True)
class FoundData:
  """The data of a run.

  Attributes:
    kind, path, field: Keys of the config section `data`.
    sentence: What was found, e.g. "notes.txt is a text file.".
    convert: How each file becomes lines of a prepared file: "" if the data is read directly,
      "texts" for documents, "parts" for parts of documents, "chats" for pairs of two fields.
    files: The paths or URLs of the files to convert.
    pair: The names of the two fields, for "chats".
  """

  kind: str
  path: str
  field: str
  sentence: str
  convert: str = ""
  files: tuple[str, ...] = ()
  pair: tuple[str, str] = ("", "")


def find(given: str) -> FoundData:
  """Recognises the data.

  Args:
    given: The path or URL of a file or a folder, or "pydoc": Python's own language reference. Of a
      URL's folder, only the files directly in it are read.

  Raises:
    InputError: It does not exist, is empty, is not text, or has fields with other names.
  """
  path = full_path(given)
  if (one := files.info(path)) is not None:
    found = {path: one.size}
    return _find_lines(path, path, found) if _is_jsonl(path) else _find_texts(path, path, found)
  found = _files_in(path)
  if given == "pydoc" and not found:
    return FoundData("pydoc", "", "text", "The data is Python's own language reference.")
  if not found and (files.is_remote(path) or not Path(path).is_dir()):
    raise _refused(repr(given), "Check the path")
  if lines := {p: size for p, size in found.items() if p.endswith(jsonl.SUFFIXES)}:
    return _find_lines(path, "", lines)
  texts = {p: size for p, size in found.items() if PurePosixPath(p).suffix in TEXT_SUFFIXES}
  if not texts:
    action = f"Name the files {', '.join(TEXT_SUFFIXES)} or .jsonl, or name one file"
    raise _refused(f"{path}, with {len(found)} files", action)
  return _find_texts(path, "", texts)


def full_path(given: str) -> str:
  """Returns a URL unchanged, and a path from the root."""
  return given if files.is_remote(given) else str(Path(given).expanduser().absolute())


def _files_in(folder: str) -> dict[str, int]:
  """Returns the sizes of the files in a folder, in order; of a local one, also in its folders."""
  if files.is_remote(folder):
    return {files.join(folder, n): i.size for n, i in files.listing(folder).items() if n[0] != "."}
  inside = sorted(p for p in Path(folder).rglob("*") if p.is_file())
  shown = [p for p in inside if not any(n.startswith(".") for n in p.relative_to(folder).parts)]
  return {str(p): p.stat().st_size for p in shown}


def _refused(found: str, action: str, expected: str = EXPECTED) -> InputError:
  return InputError(f"--data is {found}; expected {expected}. {action}.")


def _is_jsonl(path: str) -> bool:
  """Returns whether a file has a JSON object on its first line; refuses other JSON."""
  if path.endswith(jsonl.SUFFIXES):
    return True
  if not path.endswith(".json"):
    return False
  start = next((line.raw.strip() for line in jsonl.read_lines(path)), b"")
  if not start.endswith(b"}"):
    action = 'Write one object per line, e.g. {"text": "…"}, into a .jsonl file'
    raise _refused(f"{path}, one JSON value", action)
  return True


def _find_texts(path: str, one: str, found: Mapping[str, int]) -> FoundData:
  """Recognises text: a file is a document, and few documents are cut into parts.

  Args:
    path: The data.
    one: `path` for a file, "" for a folder.
    found: The sizes of the files.
  """
  for file in found:
    _check_utf8(file)
  if not sum(found.values()):
    raise _refused(f"{path}, which is empty", "Name a file with text in it")
  holds = "is a text file" if one else f"holds {_text_files(len(found))}"
  if len(found) < FEW:
    sentence = f"{path} {holds}, cut into parts, each a document."
    return FoundData("jsonl", "", "text", sentence, "parts", tuple(found))
  name = f"{path} {holds}"
  if all(_folder(p) == path and p.endswith(".txt") for p in found):
    return FoundData("text", path, "text", f"{name}, each a document.")
  return FoundData("jsonl", "", "text", f"{name}, each a document.", "texts", tuple(found))


def _folder(file: str) -> str:
  return file.rpartition("/")[0]


def _find_lines(path: str, one: str, found: Mapping[str, int]) -> FoundData:
  """Recognises JSON lines by the fields of the first ones; see `_find_texts` for the arguments."""
  rows = [line.object() for line in itertools.islice(_lines(found), LOOKED_AT)]
  if not rows:
    raise _refused(f"{path}, which is empty", "Name a file with text in it")
  name = f"{path} holds JSON lines"
  shared = [key for key in rows[0] if all(key in row for row in rows)]
  is_flat = all(p == one or _folder(p) == path for p in found)
  if "messages" in shared or {"prompt", "text"} <= set(shared):
    sentence = f"{name}: chats, of which the assistant's turns are trained on."
    if is_flat:
      return FoundData("chat", path, "text", sentence)
    return FoundData("chat", "", "text", sentence, "lines", tuple(found))
  texts = [key for key in shared if all(isinstance(row[key], str) for row in rows)]
  for prompt, completion in PAIRS:
    if prompt in texts and completion in texts:
      sentence = f"{name}: chats of one {prompt!r} and one {completion!r} each."
      return FoundData("chat", "", "text", sentence, "chats", tuple(found), (prompt, completion))
  if "text" not in texts and len(texts) != 1:
    fields = ", ".join(map(repr, rows[0])) or "none"
    expected = "a field 'text', 'messages', or 'prompt' and 'completion'"
    raise _refused(f"{path}, whose fields are {fields}", "Rename the fields", expected)
  field = "text" if "text" in texts else texts[0]
  sentence = f"{name}: texts in the field {field!r}."
  few = len(rows) < FEW
  if is_flat and not few:
    return FoundData("jsonl", path, field, sentence)
  convert = "parts" if few else "texts"
  return FoundData("jsonl", "", "text", sentence, convert, tuple(found), (field, ""))


def _text_files(count: int) -> str:
  return "1 text file" if count == 1 else f"{count:,} text files"


def _check_utf8(file: str) -> None:
  """Refuses a file that is not text, by its first megabyte."""
  with files.open_read(file) as opened:
    start = opened.read(2**20)
  if b"\0" in start:
    raise _refused(f"{file}, which is not text", "Convert it to UTF-8 text")
  if len(start) < 2**20:
    _text(file)


def _text(file: str) -> str:
  try:
    return json_io.decode_utf8(files.read(file)).removeprefix("\ufeff")
  except InputError as e:
    raise InputError(f"{file}: {e}") from e


def _lines(found: Iterable[str]) -> Iterator[jsonl.Line]:
  return jsonl.read_lines(*found, skip_bom=True)


def discard(folder: Path) -> None:
  """Removes what `prepare` has written, and the folder if nothing else is in it."""
  for path in (folder / DOCUMENTS, *folder.glob(".documents.*.part")):
    path.unlink(missing_ok=True)
  with contextlib.suppress(OSError):
    folder.rmdir()


def prepare(found: FoundData, folder: Path) -> DataOptions:
  """Writes the prepared file into `folder` if the data needs one, and returns the data's options.

  Raises:
    InputError: A line cannot be used, or there are too few documents to hold some out.
  """
  path = found.path
  if found.convert:
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / DOCUMENTS
    part = folder / f".documents.{os.getpid()}.part"
    with part.open("wb") as file:
      file.writelines(jsonl.to_line(row) for row in _converted(found))
    part.replace(target)
    path = str(target)
  data = DataOptions(kind=found.kind, path=path, field=found.field)
  if found.kind == "pydoc":
    return data
  on_bad = "skip" if found.kind == "chat" else data.on_bad  # chats longer than seq_len
  return dataclasses.replace(data, heldout_fraction=heldout_fraction(data), on_bad=on_bad)


def _converted(found: FoundData) -> Iterator[JsonObject]:
  """Yields the lines of the prepared file."""
  if found.convert == "lines":
    yield from (line.object() for line in _lines(found.files))
  elif found.convert == "chats":
    prompt, completion = found.pair
    for line in _lines(found.files):
      row = line.object()
      extra = row.get("input") if prompt == "instruction" else None
      question = _field(row, prompt, line.where) + (f"\n\n{extra}" if extra else "")
      yield {"prompt": question, "text": _field(row, completion, line.where)}
  else:
    texts = list(_texts(found)) if found.convert == "parts" else _texts(found)
    length = _part_length(sum(map(len, texts))) if isinstance(texts, list) else 0
    for text in texts:
      yield from ({"text": part} for part in (parts(text, length) if length else [text]))


def _texts(found: FoundData) -> Iterator[str]:
  field = found.pair[0]
  if field:
    yield from (_field(line.object(), field, line.where) for line in _lines(found.files))
  else:
    yield from filter(str.strip, map(_text, found.files))


def _field(row: JsonObject, key: str, where: str) -> str:
  value: Any = row.get(key)
  if not isinstance(value, str):
    raise bad_value(f"{where}, field {key!r}", value, "a string", "Repair the line")
  return value


def _part_length(characters: int) -> int:
  """Returns the characters of a part: about a hundred parts, none very short or long."""
  return max(MIN_PART, min(MAX_PART, characters // 100))


def parts(text: str, length: int) -> Iterator[str]:
  """Cuts a text into parts of at least `length` characters, in order.

  It is cut at empty lines where there are enough of them, else at line ends, else at spaces.
  """
  separators = ("\n\n", "\n", " ")
  separator = next((x for x in separators if text.count(x) * length * 4 >= len(text)), " ")
  part = ""
  for piece in text.split(separator):
    part = f"{part}{separator}{piece}" if part else piece
    if len(part) >= length:
      yield part
      part = ""
  if part.strip():
    yield part


def heldout_fraction(data: DataOptions) -> float:
  """Returns the fraction of documents to hold out: about 100 of them, at most a tenth.

  Of few documents, more are held out, until both parts have one. The number of documents is
  estimated if there is much text; see `beginning.read`.

  Raises:
    InputError: There are too few documents.
  """
  whole = sources.DocumentSource(data.kind, data.path, field=data.field, heldout_fraction=0.0)
  found = beginning.read(whole)
  count = round(len(found.documents) * found.scale)
  if count >= 200:
    return round(max(0.002, min(0.1, 100 / count)), 4)
  for fraction in (0.1, 0.2, 0.3, 0.5):
    source = dataclasses.replace(whole, heldout_fraction=fraction, split="heldout")
    held = sum(sources.in_split(document, source) for document in found.documents)
    if 0 < held < len(found.documents):
      return fraction
  raise InputError(
    f"--data holds {count} documents that differ, too few to hold one out for evaluation. Add more "
    "text: at least a few pages."
  )
