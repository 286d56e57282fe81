"""Where text comes from: a stream of documents, always in the same order.

What is held out is a function of the documents alone: a document goes by a hash of its
text (of its topic's name for `pydoc`), so neither order nor company moves it, and equal
documents fall on the same side.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
from collections.abc import Iterator
from pathlib import Path

from distill_jax.data import jsonl
from distill_jax.errors import InputError
from distill_jax.runtime import extras, json_io
from distill_jax.types import JsonObject

KINDS = ("pydoc", "text", "jsonl", "chat", "tfds")
RUN = 8  # words: a shared run as long as this counts as the same text


@dataclasses.dataclass(frozen=True)
class DocumentSource:
  """A corpus.

  Attributes:
    kind: "pydoc", Python's language reference as the running CPython carries it, a topic
      a document; "text", a UTF-8 file or a folder of .txt files, a file a document;
      "jsonl", a file or a folder of .jsonl files, one object a line; "chat", the same, each
      line a chat and a document as it stands (chat_dataset.py); "tfds", a TFDS dataset in
      array_record format.
    path: the file or folder. For tfds a prepared folder (it holds dataset_info.json), or
      DATA_DIR/NAME[:VERSION], or a NAME in TFDS's own data folder. Empty for pydoc.
    split: "train" or "heldout"; for tfds any split the dataset has ("train[:90%]").
    field: which field holds the text (jsonl, tfds).
    heldout_fraction: the share of documents held out, in expectation. 0 takes every
      document whatever the split: for a corpus with a held-out file of its own. TFDS has
      splits of its own and does not read this.
  """

  kind: str
  path: str = ""
  split: str = "train"
  field: str = "text"
  heldout_fraction: float = 0.1

  def __post_init__(self):
    if self.kind not in KINDS:
      raise InputError(f"source kind is {self.kind!r}; it can be one of {', '.join(KINDS)}")
    if self.kind != "tfds" and self.split not in ("train", "heldout"):
      raise InputError(f"split is {self.split!r}; a {self.kind} source has 'train' and 'heldout'")
    if not 0 <= self.heldout_fraction < 1:
      raise InputError(f"heldout_fraction is {self.heldout_fraction}; give at least 0 and below 1")
    if self.kind == "pydoc" and self.split == "heldout" and self.heldout_fraction == 0:
      raise InputError("heldout_fraction is 0, so pydoc has no held-out topics; give 0.1, say")
    if self.kind != "pydoc" and not self.path:
      raise InputError(f"a {self.kind} source has no path; name its file or folder in `path`")


def documents(source: DocumentSource) -> Iterator[str]:
  """Yields the documents of a source. Blank ones are skipped.

  Text is taken as it stands, line ends included: nothing is normalised.

  Raises:
    InputError: a file that is missing, malformed or not UTF-8, or no document at all.
      Files and arguments are checked as the stream reaches them.
  """
  read = {"pydoc": _pydoc, "text": _text, "jsonl": _jsonl, "chat": _lines, "tfds": _tfds}[
    source.kind
  ]
  seen = kept = 0
  for document in read(source):
    if not document.strip():
      continue
    seen += 1
    if source.kind in ("pydoc", "tfds") or in_split(document, source):
      kept += 1
      yield document
  if not kept:
    where = source.path or "the topics"
    raise InputError(
      f"{where}: no text in any document; give a corpus that holds some"
      if not seen
      else f"{where}: none of its {seen} documents falls into split {source.split!r}; give more "
      "documents, or heldout_fraction=0 and a file of its own for each split"
    )


def in_split(key: str, source: DocumentSource) -> bool:
  """Returns whether the document with this key belongs to the source's split."""
  if source.heldout_fraction == 0:
    return True
  where = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
  return (where < source.heldout_fraction) == (source.split == "heldout")


def _pydoc(source: DocumentSource) -> Iterator[str]:
  """Topics sorted by name, split by name, less the training text that is held out.

  The reference repeats itself: "compound" holds all of "for" and "while". Nine tenths of
  the held-out lines would stand in the training topics too, so a training paragraph that
  shares a run of eight words with a held-out topic is left out.
  """
  topics = importlib.import_module("pydoc_data.topics").topics
  names = [name for name in sorted(topics) if in_split(name, source)]
  if source.split == "heldout" or source.heldout_fraction == 0:
    yield from (topics[name] for name in names)
    return
  mine = set(names)
  heldout = {run for name in topics if name not in mine for run in _runs(topics[name])}
  for name in names:
    paragraphs = topics[name].split("\n\n")
    yield "\n\n".join(p for p in paragraphs if heldout.isdisjoint(_runs(p)))


def _runs(text: str) -> Iterator[tuple[str, ...]]:
  words = text.split()
  return zip(*(words[i:] for i in range(RUN)), strict=False)


def _files(source: DocumentSource, suffix: str) -> list[Path]:
  path = Path(source.path)
  if path.is_dir():
    if not (files := sorted(p for p in path.glob(f"*{suffix}") if p.is_file())):
      raise InputError(f"{path} is a folder without {suffix} files; name one that has some")
    return files
  if not path.is_file():
    raise InputError(f"{path} is not there; name a {suffix} file or a folder of them")
  return [path]


def _text(source: DocumentSource) -> Iterator[str]:
  for file in _files(source, ".txt"):
    yield _utf8(file.read_bytes(), str(file))


def _jsonl(source: DocumentSource) -> Iterator[str]:
  for line in lines(source):
    if (text := line.text()).strip():
      yield _string(jsonl.parse_object(text, line.where), source.field, line.where)


def _lines(source: DocumentSource) -> Iterator[str]:
  return (line.text() for line in lines(source))


def lines(source: DocumentSource) -> Iterator[jsonl.Line]:
  """Yields the lines of a source's .jsonl files that are not blank, of both splits."""
  return jsonl.read_lines(*_files(source, ".jsonl"))


def _utf8(raw: bytes, where: str) -> str:
  try:
    return json_io.decode_utf8(raw)
  except InputError as e:
    raise InputError(f"{where}: {e} Convert the file to UTF-8.") from e


def _string(record: JsonObject, field: str, where: str) -> str:
  """The text in one field; bytes (as TFDS gives them) are UTF-8."""
  if field not in record:
    names = ", ".join(map(repr, record)) or "none"
    raise InputError(f"{where}: no field {field!r}; the fields there are {names}")
  value = record[field]
  if isinstance(value, bytes):
    return _utf8(value, f"{where}, field {field!r}")
  if not isinstance(value, str):
    kind = type(value).__name__
    raise InputError(f"{where}: field {field!r} holds {kind}; name one that holds a string")
  if half := json_io.lone_surrogate(value):
    raise InputError(f"{where}: field {field!r} holds half a surrogate pair, {half!r}; mend it")
  return value


def _tfds(source: DocumentSource) -> Iterator[str]:
  with extras.needed("tfds"):  # here, because it takes seconds
    import tensorflow_datasets as tfds

  path = Path(source.path)
  try:
    if (path / "dataset_info.json").is_file():
      records = tfds.builder_from_directory(path).as_data_source(source.split)
    else:
      data_dir = path.parent if len(path.parts) > 1 else None
      records = tfds.data_source(path.name, split=source.split, data_dir=data_dir, download=False)
  except (ValueError, NotImplementedError, AssertionError, FileNotFoundError) as e:
    reason = str(e).partition("\n")[0].rstrip(". ")
    raise InputError(
      f"{path}: split {source.split!r} cannot be read ({reason}); give a dataset prepared with "
      "file_format='array_record' and one of its splits"
    ) from e
  for number, record in enumerate(records):
    yield _string(record, source.field, f"{path}[{source.split}], record {number}")
