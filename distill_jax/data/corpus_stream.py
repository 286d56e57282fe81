"""The rows of a corpus from any row on, and the check that the corpus is still the same.

A cursor names the place where a row begins: a block of the corpus, a number of its tokens, and a
digest of all blocks before it. Packing continues from a cursor and does not read the blocks before.
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
  """The place in a corpus where a row begins.

  Attributes:
    row: The index of the row.
    place: The place of a block.
    skip: The number of tokens of the block before the row.
    before: The digest of all blocks before the block; "" for none.
    block: The digest of the block; "" if it has not been read.
    is_end: True if the corpus ends there.
  """

  row: int = 0
  place: Place = sources.BEGINNING
  skip: int = 0
  before: str = ""
  block: str = ""
  is_end: bool = False

  def changed(self, source: DocumentSource) -> InputError:
    """Returns the error for a corpus that is not the one that the cursor was made from."""
    return InputError(
      f"{source.path} has changed since its first {self.row} sequences were packed. Restore it, or "
      "choose another folder."
    )


START = Cursor()


class CorpusStream:
  """The rows of a corpus from a cursor on, tokenized by several processes and packed in order.

  Args:
    work: What tokenizes the blocks.
    packer: What packs them.
    workers: The number of processes; 0 for one per core.
    start: The place of the first row.

  Attributes:
    source: The corpus.
    counts: The documents that were read so far.
    end: The cursor after the last row that was yielded.
  """

  def __init__(
    self, work: BlockTokenizer, packer: packing.Packer, workers: int = 1, start: Cursor = START
  ):
    self._work, self._packer, self._workers, self._start = work, packer, workers, start
    self.source = work.source
    self._blocks: deque[tuple[int, Cursor]] = deque()  # tokens before a block, and its place
    self.counts, self.end = Counts("skip"), start

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
          raise start.changed(source)
        self._blocks.append((total, Cursor(0, block.place, 0, before, digest)))
        before = link(before, block, digest)
        self.counts.add(counts)
        for row in self._packer.add(tokens.after(-total) if total < 0 else tokens):
          yield self._yielded(row)
        total += len(tokens.ids_X)
    finally:
      self.counts.report(source)
    if start.row and not self._blocks:
      raise start.changed(source)
    if not start.row:
      self.counts.check(source)
    for row in self._packer.finish():
      yield self._yielded(row)
    self.end = dataclasses.replace(self.end, is_end=True)

  def _yielded(self, row: packing.PackedRow) -> packing.PackedRow:
    while len(self._blocks) > 1 and self._blocks[1][0] <= row.stop:
      self._blocks.popleft()
    total, place = self._blocks[0]
    self.end = dataclasses.replace(place, row=self.end.row + 1, skip=row.stop - total)
    return row


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
