"""The rows of a corpus from a place on, and the check that the corpus is still the same.

A cursor names a place from which packing can be repeated: a block of the corpus, a number of its
tokens, and a digest of all blocks before it. Packing continues from a cursor and does not read the
blocks before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections import deque
from collections.abc import Generator

from distill_jax.data import packing, sources
from distill_jax.data.block_tokenizer import BlockTokenizer, Counts, tokenized
from distill_jax.data.sources import Block, DocumentSource, Place
from distill_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Cursor:
  """A place in a corpus from which packing can be repeated.

  Attributes:
    rows: The number of rows of each length before the place; () for none.
    place: The place of a block.
    skip: The number of tokens of the block before the place.
    before: The digest of all blocks before the block; "" for none.
    block: The digest of the block; "" if it has not been read.
    is_end: True if the corpus ends there.
  """

  rows: tuple[int, ...] = ()
  place: Place = sources.BEGINNING
  skip: int = 0
  before: str = ""
  block: str = ""
  is_end: bool = False


START = Cursor()


class CorpusStream:
  """The rows of a corpus from a cursor on, tokenized by several processes and packed in order.

  Args:
    work: What tokenizes the blocks.
    packer: What packs them.
    workers: The number of processes; 0 for one per core.
    start: The place at which to begin.

  Attributes:
    source: The corpus.
    counts: The documents that were read so far.
    rows_of: The number of rows of each length before and including the last that was yielded.
    end: The last place before the next row from which packing can be repeated.
  """

  def __init__(
    self, work: BlockTokenizer, packer: packing.Packer, workers: int = 1, start: Cursor = START
  ):
    self._work, self._packer, self._workers, self._start = work, packer, workers, start
    self.source = work.source
    self._blocks: deque[tuple[int, Cursor]] = deque()  # tokens before a block, and its place
    self._stop = 0
    self.counts, self.end = Counts("skip"), start
    rows = start.rows or [0] * len(packer.lengths)
    self.rows_of = dict(zip(packer.lengths, rows, strict=True))

  def rows(self) -> Generator[packing.PackedRow, None, None]:
    """Yields the rows.

    Raises:
      InputError: If the corpus cannot be used, or the block at the start is not the same any more.
    """
    source, start = self.source, self._start
    before, total = start.before, -start.skip
    blocks = sources.blocks(source, start.place)
    try:
      for block, (tokens, counts, digest) in tokenized(blocks, self._work, self._workers):
        if not self._blocks and start.block not in ("", digest):
          raise changed(source, sum(start.rows))
        self._blocks.append((total, Cursor((), block.place, 0, before, digest)))
        before = link(before, block, digest)
        self.counts.add(counts)
        for row in self._packer.add(tokens.after(-total) if total < 0 else tokens):
          yield self._yielded(row)
        total += len(tokens.ids_X)
    finally:
      self.counts.report(source)
    if start.rows and not self._blocks:
      raise changed(source, sum(start.rows))
    if not start.rows:
      self.counts.check(source)
    for row in self._packer.finish():
      yield self._yielded(row)
    self.end = dataclasses.replace(self.end, is_end=True)

  def _yielded(self, row: packing.PackedRow) -> packing.PackedRow:
    self.rows_of[len(row.tokens_T)] += 1
    if row.stop > self._stop:
      self._stop = row.stop
      while len(self._blocks) > 1 and self._blocks[1][0] <= row.stop:
        self._blocks.popleft()
      total, place = self._blocks[0]
      rows = tuple(self.rows_of.values())
      self.end = dataclasses.replace(place, rows=rows, skip=row.stop - total)
    return row


def changed(source: DocumentSource, rows: int) -> InputError:
  """Returns the error for a corpus that is not the one of which `rows` rows are packed."""
  return InputError(
    f"{source.path} has changed since its first {rows} sequences were packed. Restore it, or "
    "choose another folder."
  )


def link(before: str, block: Block, digest: str) -> str:
  """Returns the digest of all blocks up to this one, given that of the blocks before it."""
  name = block.file.rpartition("/")[2]
  return hashlib.sha256(f"{before} {name} {digest}".encode()).hexdigest()


def fingerprint(source: DocumentSource) -> str:
  """Returns a digest of the names, sizes and versions of a corpus's files, without reading them."""
  if source.kind in ("pydoc", "tfds"):
    listed = [[source.path, platform.python_version() if source.kind == "pydoc" else ""]]
  else:
    found = sources.find(source).items()
    listed = [[path.rpartition("/")[2], str(i.size), i.version] for path, i in found]
  return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def is_same(source: DocumentSource, cursor: Cursor) -> bool:
  """Reads a corpus up to a cursor; returns True if it is the one that the cursor was made from."""
  before, found = "", False
  for block in sources.blocks(source):
    if found:  # there is more after the end
      return False
    digest = sources.digest(block.read(source.kind))
    if block.place == cursor.place:
      if (before, digest) != (cursor.before, cursor.block):
        return False
      if not cursor.is_end:
        return True
      found = True
    before = link(before, block, digest)
  return found
