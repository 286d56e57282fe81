"""Document sources: streams of text documents in a fixed order.

The split of a document depends only on a hash of its text (for `pydoc`, of its topic's name). So it
does not depend on the order or on other documents, and equal documents are in the same split.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
from collections.abc import Iterator
from pathlib import Path

from distill_jax.data import jsonl
from distill_jax.errors import InputError, bad_value
from distill_jax.runtime import extras, json_io
from distill_jax.types import JsonObject

KINDS = ("pydoc", "text", "jsonl", "chat", "tfds")
RUN = 8  # number of consecutive words that two texts must share to be considered the same text


@dataclasses.dataclass(frozen=True)
class DocumentSource:
  """A corpus, or a split of one.

  Attributes:
    kind: The format:
      "pydoc": Python's language reference, from the running CPython; each topic is a document.
      "text": A UTF-8 file, or a folder of .txt files; each file is a document.
      "jsonl": A .jsonl file or a folder of them; each line is a JSON object with a text.
      "chat": A .jsonl file or a folder of them; each line is a chat (chat_dataset.py), and a
        document is the raw line.
      "tfds": A TFDS dataset in array_record format.
    path: The file or folder; "" for "pydoc". For "tfds", a prepared folder (with
      dataset_info.json), DATA_DIR/NAME[:VERSION], or a NAME in TFDS's default folder.
    split: "train" or "heldout"; for "tfds", any split of the dataset, e.g. "train[:90%]".
    field: The field that contains the text, for "jsonl" and "tfds".
    heldout_fraction: The expected fraction of held-out documents. 0 puts every document into both
      splits, for a corpus with a separate held-out file. Not used for "tfds".
  """

  kind: str
  path: str = ""
  split: str = "train"
  field: str = "text"
  heldout_fraction: float = 0.1

  def __post_init__(self):
    if self.kind not in KINDS:
      raise bad_value("kind", self.kind, f"one of {KINDS}", "Choose one of them")
    if self.kind != "tfds" and self.split not in ("train", "heldout"):
      raise bad_value("split", self.split, "'train' or 'heldout'", "Choose one of them")
    if not 0 <= self.heldout_fraction < 1:
      raise bad_value(
        "heldout_fraction", self.heldout_fraction, "a fraction in [0, 1)", "Correct it"
      )
    if self.kind == "pydoc" and self.split == "heldout" and self.heldout_fraction == 0:
      expected = "a positive fraction for the split 'heldout' of pydoc"
      raise bad_value("heldout_fraction", self.heldout_fraction, expected, "Set it, e.g. to 0.1")
    if self.kind != "pydoc" and not self.path:
      raise bad_value("path", self.path, f"a file or folder for kind={self.kind!r}", "Set it")


def documents(source: DocumentSource) -> Iterator[str]:
  """Yields the documents of a source, except blank ones.

  Text is not normalised, and line ends are kept.

  Raises:
    InputError: If a file is missing, malformed or not UTF-8, or there is no document. Files are
      checked when the stream reaches them.
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
    where = source.path or "pydoc"
    if not seen:
      raise InputError(f"{where} has no document with text. Use another corpus.")
    raise InputError(
      f"{where} has {seen} documents, but the split {source.split!r} has none of them. Add "
      "documents, or use a separate file for each split with heldout_fraction=0."
    )


def in_split(key: str, source: DocumentSource) -> bool:
  """Returns True if the document with this key belongs to the source's split.

  Args:
    key: The document's text or name, whose hash determines the split.
    source: The source.
  """
  if source.heldout_fraction == 0:
    return True
  share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
  return (share < source.heldout_fraction) == (source.split == "heldout")


def _pydoc(source: DocumentSource) -> Iterator[str]:
  """Yields the topics of the split, sorted by name, without held-out text in training topics.

  The reference repeats itself: "compound" contains all of "for" and "while". Nine tenths of the
  held-out lines also occur in training topics, so every training paragraph that shares a run of
  RUN words with a held-out topic is removed.
  """
  topics = importlib.import_module("pydoc_data.topics").topics
  names = [name for name in sorted(topics) if in_split(name, source)]
  if source.split == "heldout" or source.heldout_fraction == 0:
    yield from (topics[name] for name in names)
    return
  train = set(names)
  heldout = {run for name in topics if name not in train for run in _runs(topics[name])}
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
      raise InputError(f"{path} is a folder without {suffix} files. Name another folder.")
    return files
  if not path.is_file():
    raise InputError(f"{path} does not exist. Name a {suffix} file or a folder of them.")
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
  """Yields the lines of a source's .jsonl files, of both splits, except blank lines."""
  return jsonl.read_lines(*_files(source, ".jsonl"))


def _utf8(raw: bytes, where: str) -> str:
  try:
    return json_io.decode_utf8(raw)
  except InputError as e:
    raise InputError(f"{where}: {e} Convert the file to UTF-8.") from e


def _string(record: JsonObject, field: str, where: str) -> str:
  """Returns the text in one field; bytes (from TFDS) are decoded as UTF-8."""
  if field not in record:
    names = ", ".join(map(repr, record)) or "no fields"
    raise InputError(f"{where} has no field {field!r} (it has {names}). Name another field.")
  value = record[field]
  if isinstance(value, bytes):
    return _utf8(value, f"{where}, field {field!r}")
  if not isinstance(value, str):
    kind = type(value).__name__
    raise InputError(
      f"{where}: field {field!r} has the type {kind}; expected a string. Name another field."
    )
  if half := json_io.lone_surrogate(value):
    raise InputError(
      f"{where}: field {field!r} contains half a surrogate pair, {half!r}. Correct the text."
    )
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
      f"{path}: split {source.split!r} cannot be read ({reason}). Name a split of a dataset that "
      "was prepared with file_format='array_record'."
    ) from e
  for number, record in enumerate(records):
    yield _string(record, source.field, f"{path}[{source.split}], record {number}")
