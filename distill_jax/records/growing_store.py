"""Writing of a store whose number of sequences may be unknown until its end."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from distill_jax.errors import InputError, bad_value
from distill_jax.records import manifest as manifest_lib
from distill_jax.records import recording
from distill_jax.records.fields import Record
from distill_jax.records.manifest import Manifest
from distill_jax.records.store import Store, Writer, unfinished_store
from distill_jax.runtime import storage


class GrowingStore:
  """Writer of records in order, which writes full shards in the background and resumes.

  Args:
    folder: The folder of the store.
    manifest: The manifest. Its corpus and extents are replaced by those of the records.
    sequences: Total number of records; None if it is not known.
  """

  def __init__(self, folder: Path, manifest: Manifest, sequences: int | None):
    self._folder, self._manifest, self._sequences = folder, manifest, sequences
    self._writer: Writer | None = None
    self._found: Store | None = None  # shards that earlier runs finished
    self._stored: list[range] = []  # their ranges, in order
    self._background = ThreadPoolExecutor(1)
    self._writing: Future[Any] | None = None
    self._shard: list[Record] = []  # records of the current shard
    self._added = self._end = 0  # number of records; the index after the current shard

  def stored(self, first: int, rows: Sequence[Record]) -> list[bool]:
    """Returns True for each row that earlier runs have stored.

    Args:
      first: Index of the first row.
      rows: Rows, with or without targets.

    Raises:
      InputError: Other rows are stored, or there are more rows than planned.
    """
    past = first + len(rows)
    if self._sequences is not None and past > self._sequences:
      expected = f"at least the number of rows that are added, {past}"
      raise bad_value("sequences", self._sequences, expected, "Raise it")
    if self._writer is None and first == 0:
      found = manifest_lib.find(storage.location(self._folder))
      if found is not None:
        self._open(rows[0], found.total)
    if self._found is None:
      return [False] * len(rows)
    after = bisect_right(self._stored, first, key=lambda shard: shard.stop)
    before = bisect_left(self._stored, past, key=lambda shard: shard.start)
    stored = [False] * len(rows)
    for shard in self._stored[after:before]:  # those with some of the rows
      if shard[-1] < past:
        recording.check_same_row(self._found, shard[-1], rows[shard[-1] - first])
      for i in range(max(first, shard.start), min(past, shard.stop)):
        stored[i - first] = True
    return stored

  def add(self, records: Sequence[Record]) -> None:
    """Adds records. Records that are already stored may lack targets."""
    for record in records:
      if self._writer is None and self._sequences is not None:
        self._open(record, self._sequences)
      if not self._shard:
        self._end = self._end_of_shard(self._added)
      self._shard.append(record)
      self._added += 1
      if self._added == self._end:
        self._write_shard()

  def finish(self) -> Manifest:
    """Writes the last shard and completes the store.

    Raises:
      InputError: There are fewer records than planned, or no records.
    """
    if self._sequences is not None and self._added < self._sequences:
      expected = f"the number of rows that were added, {self._added}"
      raise bad_value("sequences", self._sequences, expected, "Add the other rows")
    if self._shard:
      self._write_shard()
    self._wait()
    if self._writer is None:
      raise InputError("No rows were added. Call add with rows and the teacher's outputs.")
    if (done := self._writer.complete()) is None:
      raise InputError(
        f"{self._folder} holds more rows than the {self._added} that were added. Add all of them."
      )
    return done

  def close(self) -> None:
    """Waits for the shard that is being written and releases the folder."""
    self._background.shutdown()
    if self._writer is not None:
      self._writer.close()

  def _open(self, first_row: Record, total: int) -> Writer:
    """Opens the writer, once the first row is known."""
    manifest = dataclasses.replace(
      self._manifest,
      corpus=recording.text_digest(first_row),
      extents=(self._sequences or total,),
    )
    self._writer = Writer(self._folder, manifest)
    self._found = unfinished_store(self._writer)
    shards = self._found.manifest.shards
    self._stored = [range(s.first, s.first + s.count) for s in shards]
    return self._writer

  def _end_of_shard(self, first: int) -> int:
    """Returns the index after the last record of the shard that begins at `first`."""
    ranges = self._writer.manifest.ranges if self._writer else []
    at = bisect_left(ranges, first, key=lambda shard: shard.start)
    is_planned = at < len(ranges) and ranges[at].start == first
    return ranges[at].stop if is_planned else first + self._manifest.sequences_per_shard

  def _write_shard(self) -> None:
    """Starts writing the records of the current shard, unless they are already stored."""
    records, self._shard = self._shard, []
    rows = range(self._added - len(records), self._added)
    self._wait()
    writer = self._writer or self._open(records[0], len(records))
    if rows.stop > writer.manifest.total:
      writer.lengthen(rows.stop)
    if rows not in self._stored:
      self._writing = self._background.submit(writer.write_shard, rows, records)

  def _wait(self) -> None:
    if self._writing is not None:
      self._writing.result()
      self._writing = None
