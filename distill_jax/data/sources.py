"""Document sources: streams of text documents in a fixed order.

A corpus is read in blocks of about BLOCK_BYTES, which can be parsed by several processes. Only the
named file, or the files directly in the named folder, are read, and one block of them is in memory.

The split of a document depends only on a hash of its text (for `pydoc`, of its topic's name). So it
does not depend on the order or on other documents, and equal documents are in the same split.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from distill_jax.data import jsonl, python_reference
from distill_jax.errors import InputError, bad_value
from distill_jax.runtime import extras, files, json_io
from distill_jax.runtime.files import FileInfo

if TYPE_CHECKING:  # the workers of `pack` must not import jax
  from distill_jax.types import JsonObject

KINDS = ("pydoc", "text", "jsonl", "chat", "tfds")
SUFFIXES = {"text": (".txt",), "jsonl": jsonl.SUFFIXES, "chat": jsonl.SUFFIXES}
BLOCK_BYTES = 2**20  # minimum size of a block, except the last one of a file
BLOCK_DOCUMENTS = 256  # maximum number of text files, topics or TFDS records in a block


@dataclasses.dataclass(frozen=True)
class DocumentSource:
  """A corpus, or a split of one.

  Attributes:
    kind: The format:
      "pydoc": Python's language reference, from the running CPython; each topic is a document.
      "text": A UTF-8 file, or a folder of .txt files; each file is a document.
      "jsonl": A .jsonl or .jsonl.gz file or a folder of them; each line is a JSON object with a
        text.
      "chat": A .jsonl or .jsonl.gz file or a folder of them; each line is a chat (chat_dataset.py),
        and a document is the raw line.
      "tfds": A TFDS dataset in array_record format.
    path: The path or URL of the file or folder; "" for "pydoc". For "tfds", a prepared folder (with
      dataset_info.json), DATA_DIR/NAME[:VERSION], or a NAME in TFDS's default folder; of URLs, only
      gs:// ones.
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


class Place(NamedTuple):
  """The place at which a block begins.

  Attributes:
    file: The index of its first file.
    offset: The offset of its first byte in the file; for "pydoc" and "tfds", the number of
      documents before it.
    line: The number of lines before it in the file.
  """

  file: int = 0
  offset: int = 0
  line: int = 0


BEGINNING = Place()


class Block(NamedTuple):
  """Consecutive documents that are not parsed yet.

  Attributes:
    place: Its place in the corpus.
    file: The path of its first file, for messages.
    content: The lines of a file; or the paths of text files; or the documents of "pydoc" or "tfds"
      that belong to the source's split.
  """

  place: Place
  file: str
  content: bytes | tuple[str, ...]

  def read(self, kind: str) -> Iterator[bytes]:
    """Yields the bytes of the block; for a source of kind "text", the files are read."""
    if isinstance(self.content, bytes):
      yield self.content
    else:
      yield from (files.read(c) if kind == "text" else c.encode() for c in self.content)


def digest(content: Iterable[bytes]) -> str:
  """Returns the SHA-256 digest of the bytes of a block, in hex."""
  total = hashlib.sha256()
  for part in content:
    total.update(len(part).to_bytes(8, "big"))
    total.update(part)
  return total.hexdigest()


class Document(NamedTuple):
  """A document.

  Attributes:
    text: Its text.
    where: Its place, for messages.
    in_split: True if it belongs to the source's split.
  """

  text: str
  where: str
  in_split: bool


def documents(source: DocumentSource) -> Iterator[str]:
  """Yields the documents of a source, except blank ones.

  Text is not normalised, and line ends are kept.

  Raises:
    InputError: If a file is missing, malformed or not UTF-8, or there is no document. Files are
      checked when the stream reaches them.
  """
  seen = kept = 0
  for block in blocks(source):
    for document in parse(block, block.read(source.kind), source):
      seen += 1
      if document.in_split:
        kept += 1
        yield document.text
  check_counts(source, seen, kept)


def check_counts(source: DocumentSource, seen: int, kept: int) -> None:
  """Raises InputError if a source has no documents, given their number and that of its split."""
  where = source.path or "pydoc"
  if not seen:
    raise InputError(f"{where} has no document with text. Use another corpus.")
  if not kept:
    raise InputError(
      f"{where} has {seen} documents, but the split {source.split!r} has none of them. Add "
      "documents, or use a separate file for each split with heldout_fraction=0."
    )


def blocks(source: DocumentSource, start: Place = BEGINNING) -> Iterator[Block]:
  """Yields the blocks of a source in order. They depend only on the corpus.

  Args:
    source: The source.
    start: The place of the first block to yield.

  Raises:
    InputError: If a file is missing or cannot be read.
  """
  if source.kind in ("pydoc", "tfds"):
    texts = _pydoc(source) if source.kind == "pydoc" else _tfds(source)
    texts, number = itertools.islice(texts, start.offset, None), start.offset
    while batch := tuple(itertools.islice(texts, BLOCK_DOCUMENTS)):
      yield Block(Place(offset=number), source.path, batch)
      number += len(batch)
    return
  found = find(source)
  if source.kind == "text":
    yield from _text_blocks(found, start.file)
    return
  for index, file in enumerate(found):
    if index >= start.file:
      first = start if index == start.file else Place(index)
      yield from _line_blocks(file, first)


def parse(block: Block, content: Iterable[bytes], source: DocumentSource) -> Iterator[Document]:
  """Yields the documents of a block, except blank ones.

  Args:
    block: The block.
    content: Its bytes, from `Block.read`.
    source: The source that the block belongs to.

  Raises:
    InputError: If the content is malformed or not UTF-8.
  """
  chosen = source.kind in ("pydoc", "tfds")
  for text, where in _texts(block, content, source):
    if text.strip():
      yield Document(text, where, chosen or in_split(text, source))


def find(source: DocumentSource) -> dict[str, FileInfo]:
  """Returns the files of a source of kind "text", "jsonl" or "chat", in order.

  Raises:
    InputError: If the path does not exist, or the folder has no such files.
  """
  return jsonl.find_files(source.path, SUFFIXES[source.kind])


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
  is_whole = source.split == "heldout" or source.heldout_fraction == 0
  return python_reference.topics(lambda name: in_split(name, source), whole=is_whole)


def _text_blocks(found: Mapping[str, FileInfo], first: int) -> Iterator[Block]:
  """Yields blocks of whole text files, from the file with index `first`."""
  paths, size, index = [], 0, first
  for path, info in itertools.islice(found.items(), first, None):
    paths.append(path)
    size += info.size
    if size >= BLOCK_BYTES or len(paths) == BLOCK_DOCUMENTS:
      yield Block(Place(index), paths[0], tuple(paths))
      index += len(paths)
      paths, size = [], 0
  if paths:
    yield Block(Place(index), paths[0], tuple(paths))


def _line_blocks(file: str, start: Place) -> Iterator[Block]:
  """Yields blocks of whole lines of one file."""
  index, offset, line = start
  with jsonl.open_file(file) as stream:
    stream.seek(offset)
    while raw := stream.read(BLOCK_BYTES):
      raw += stream.readline()
      yield Block(Place(index, offset, line), file, raw)
      offset += len(raw)
      line += raw.count(b"\n")


def _texts(
  block: Block, content: Iterable[bytes], source: DocumentSource
) -> Iterator[tuple[str, str]]:
  """Yields the text and the place of each document of a block, of both splits."""
  _, offset, line = block.place
  if isinstance(block.content, tuple):
    for name, raw in zip(block.content, content, strict=True):
      where = name if source.kind == "text" else source.path
      yield _utf8(raw, where), where
    return
  for raw in content:
    for each in jsonl.split_lines(io.BytesIO(raw), block.file, line + 1, offset):
      text = each.text()
      if source.kind == "jsonl" and text.strip():
        text = _string(jsonl.parse_object(text, each.where), source.field, each.where)
      yield text, each.where


def _utf8(raw: bytes, where: str) -> str:
  try:
    return json_io.decode_utf8(raw)
  except InputError as e:
    raise InputError(f"{where}: {e}") from e


def _string(record: JsonObject, field: str, where: str) -> str:
  """Returns the text in one field; bytes (from TFDS) are decoded as UTF-8."""
  if field not in record:
    names = ", ".join(map(repr, record)) or "no fields"
    raise InputError(f"{where} has no field {field!r} (it has {names}). Set data.field.")
  value = record[field]
  if isinstance(value, bytes):
    return _utf8(value, f"{where}, field {field!r}")
  if not isinstance(value, str):
    kind = type(value).__name__
    raise InputError(
      f"{where}: field {field!r} has the type {kind}; expected a string. Set data.field."
    )
  if half := json_io.lone_surrogate(value):
    raise InputError(
      f"{where}: field {field!r} contains half a surrogate pair, {half!r}. Correct the text."
    )
  return value


def _tfds(source: DocumentSource) -> Iterator[str]:
  with extras.needed("tfds"):  # here, because it takes seconds
    import tensorflow_datasets as tfds
  from etils import epath

  if files.is_remote(source.path) and not source.path.startswith("gs://"):
    expected = "a local path or a gs:// URL for kind='tfds', because TFDS reads no others"
    raise bad_value("data.path", source.path, expected, "Copy the dataset")
  path = epath.Path(source.path)
  try:
    if (path / "dataset_info.json").is_file():
      records = tfds.builder_from_directory(path).as_data_source(source.split)
    else:
      data_dir = path.parent if len(path.parts) > 1 else None
      records = tfds.data_source(path.name, split=source.split, data_dir=data_dir, download=False)
  except (ValueError, NotImplementedError, AssertionError, OSError, RuntimeError) as e:
    reason = str(e).partition("\n")[0].rstrip(". ")
    raise InputError(
      f"{path}: split {source.split!r} cannot be read ({reason}). Name a split of a dataset that "
      "was prepared with file_format='array_record'."
    ) from e
  for number, record in enumerate(records):
    yield _string(record, source.field, f"{path}[{source.split}], record {number}")
