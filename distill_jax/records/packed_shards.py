"""The shards of a store of packed text, whose length is not known before the corpus ends."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from distill_jax.data.corpus_stream import Cursor
from distill_jax.data.sources import Place
from distill_jax.records import manifest as manifest_lib
from distill_jax.records import recording
from distill_jax.records.fields import Record
from distill_jax.records.manifest import Manifest, Shard
from distill_jax.records.store import Store, Writer, unfinished_store
from distill_jax.runtime import files, json_io, storage

PLACES = "packing"


class PackedShards:
  """The shards of a store of packed text. The last full one is written in the background.

  Before a shard is registered, `packing/ROW.json` is written with a place from which the rows of
  the next shard can be packed, where ROW is the first of them.

  Args:
    planned: The manifest; its corpus and extents are replaced by those of the rows.
    folder: The folder of the store.

  Attributes:
    packed: The number of rows that were written.
    missing: The first row that is missing when packing starts.
    length: The length of the rows.
  """

  def __init__(self, planned: Manifest, folder: Path):
    self._planned, self._folder = planned, folder
    self._where = storage.location(folder)
    self._background = ThreadPoolExecutor(1)
    self._writing: Future[Shard] | None = None
    self._writer: Writer | None = None
    self._found: Store | None = None  # of the finished shards
    self._ends: dict[int, int] = {}  # of the planned shards, by first row
    self._shard: list[Record] = []
    self.packed, self.missing, self.length = 0, 0, planned.seq_len

  def __enter__(self) -> PackedShards:
    if (found := manifest_lib.find(self._where)) is not None:
      writer = self._open(found.corpus, found.total)
      missing = writer.missing()
      self.missing = missing[0].start if missing else writer.manifest.total
    return self

  def __exit__(self, *_: object) -> None:
    self._background.shutdown()
    if self._writer is not None:
      self._writer.close()

  @property
  def total(self) -> int:
    """Number of rows that are planned or finished."""
    return self._writer.manifest.total if self._writer else 0

  def _open(self, digest: str, rows: int) -> Writer:
    manifest = dataclasses.replace(self._planned, corpus=digest, extents=(rows,))
    self._writer = Writer(self._folder, manifest)
    self._found = unfinished_store(self._writer)
    self._ends = {r.start: r.stop for r in self._writer.manifest.ranges}
    return self._writer

  def cursor(self) -> Cursor:
    """Returns a place from which the missing rows can be packed, or the beginning of the corpus."""
    if files.info(file := self._cursor_file(self.missing)) is None:
      return Cursor()
    found = json_io.parse_object(files.read(file), file, "Pack into another folder")
    if "rows" not in found:  # of an earlier version: packed again and compared
      return Cursor()
    return Cursor(**{**found, "place": Place(*found["place"]), "rows": tuple(found["rows"])})

  def _cursor_file(self, row: int) -> str:
    return files.join(self._where, f"{PLACES}/{row:09d}.json")

  def is_same(self, index: int, row: Record) -> bool:
    """Returns True if a finished row is this one."""
    assert self._found is not None
    finished = self._found[index]
    return all(np.array_equal(finished[name], x) for name, x in row.items())

  def add(self, stop: int, row: Record, after: Cursor) -> None:
    """Adds a row.

    Args:
      stop: The index of the row after it.
      row: The row.
      after: A place from which the rows after it can be packed.
    """
    self._shard.append(row)
    first = stop - len(self._shard)
    if stop == self._ends.get(first, first + self._planned.sequences_per_shard):
      self.flush(stop, after)

  def flush(self, stop: int, after: Cursor) -> None:
    """Starts writing the rows of the current shard.

    Args:
      stop: The index of the row after them.
      after: A place from which the rows from there on can be packed.
    """
    rows, self._shard = self._shard, []
    self.wait()
    if rows and self._writer is None:
      self._open(recording.text_digest(rows[0]), len(rows))
    cursor = json.dumps(dataclasses.asdict(after), indent=1)
    files.write(self._cursor_file(stop), cursor.encode())
    if rows:
      writer = self._writer
      assert writer is not None
      if stop > writer.manifest.total:
        writer.lengthen(stop)
      self._writing = self._background.submit(
        writer.write_shard, range(stop - len(rows), stop), rows
      )
      self.packed += len(rows)

  def wait(self) -> None:
    """Waits for the shard that is being written."""
    if self._writing is not None:
      self._writing.result()
      self._writing = None

  def complete(self) -> Manifest | None:
    """Completes the store and returns its manifest; None for a store without rows."""
    return self._writer.complete() if self._writer else None
