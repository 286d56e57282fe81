"""Packing of a corpus into a store of text, which `record` and `train` read by index.

Blocks of the corpus are tokenized by a pool of processes and packed in order, so the bytes of the
store do not depend on the number of processes. Memory holds a shard that is filled, a shard that is
written, and a few blocks, whatever the size of the corpus.

Before a shard is registered, `packing/ROW.json` is written with the place in the corpus where the
next shard begins (corpus_stream.Cursor). A run that was stopped continues there. If the files of
the corpus have changed since, the part that is already packed is read again and compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import itertools
import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax

from distill_jax.data import corpus, corpus_stream, sources
from distill_jax.data.block_tokenizer import BlockTokenizer
from distill_jax.data.corpus_stream import CorpusStream, Cursor
from distill_jax.data.options import DataOptions
from distill_jax.errors import InputError
from distill_jax.records import manifest as manifest_lib
from distill_jax.records import recorder
from distill_jax.records.fields import Record
from distill_jax.records.manifest import Manifest, Shard
from distill_jax.records.store import Store, Writer, unfinished_store
from distill_jax.runtime import files, json_io, storage
from distill_jax.runtime.distributed import Preemption
from distill_jax.runtime.progress import Progress
from distill_jax.types import JsonObject

STATE, PLACES = "packing.json", "packing"
ACTION = "Pack into another folder"
# The settings that decide the rows of a corpus, besides those in the manifest.
SETTINGS = ("kind", "split", "field", "heldout_fraction", "on_bad", "trust")


def pack(
  data: DataOptions, work: BlockTokenizer, planned: Manifest, folder: Path, workers: int = 1
) -> tuple[Manifest, int]:
  """Packs a corpus into a store. Shards that are finished are kept.

  Args:
    data: The config section `data`.
    work: What tokenizes the corpus, from `corpus.block_tokenizer`.
    planned: The manifest. Its corpus and extents are replaced by those of the rows.
    folder: The folder of the store.
    workers: The number of processes that tokenize; 0 for one per core.

  Returns:
    The manifest of the finished store, and the number of rows that this call packed.

  Raises:
    InputError: The corpus cannot be used, or has changed since it was partly packed, or the folder
      holds other records.
    Preempted: SIGTERM was received; finished shards are kept.
  """
  with _Shards(planned, folder, data.sequences) as shards:
    where = storage.location(folder)
    try:
      cursor, work = _resume(data, work, where, shards.resume_at())
      if not (cursor.is_end or cursor.row == data.sequences > 0):
        _write(CorpusStream(work, corpus.packer(data), workers, cursor), shards, data)
    except InputError:
      if not _exists(files.join(where, manifest_lib.NAME)):
        files.remove(files.join(where, STATE))  # so that a corrected command can use the folder
      raise
    return shards.complete(), shards.packed


def _write(stream: CorpusStream, shards: _Shards, data: DataOptions) -> None:
  """Writes the rows of a stream."""
  first, limit = stream.end.row, data.sequences
  alone = jax.process_count() == 1  # otherwise, the other processes wait for this one
  with (
    contextlib.closing(stream.rows()) as rows,
    Progress("pack", limit or None, "sequences", first) as progress,
    Preemption() as preemption,
  ):
    for row in itertools.islice(rows, limit - first if limit else None):
      shards.add(corpus.record(row, data), stream.end)
      progress.add(1)
      if alone and preemption.reached(stream.end.row):
        shards.wait()
        raise Preemption.stop("pack", "finished shards are kept")
  shards.flush(stream.end)
  shards.wait()


def _resume(
  data: DataOptions, work: BlockTokenizer, folder: str, row: int
) -> tuple[Cursor, BlockTokenizer]:
  """Returns the cursor at which to continue, and `work` with the date on which packing began.

  Args:
    data: The config section `data`.
    work: What tokenizes the corpus.
    folder: The path or URL of the store.
    row: The first row that is missing.

  Raises:
    InputError: The settings or the corpus have changed.
  """
  state = _state(data, work)
  file, cursor = files.join(folder, STATE), Cursor()
  if _exists(file) and _exists(files.join(folder, manifest_lib.NAME)):
    before = json_io.parse_object(files.read(file), file, ACTION)
    _check_settings(before["settings"], state["settings"], folder)
    cursor = _load_cursor(folder, row)
    changed = cursor.row and before["files"] != state["files"]
    if changed and not corpus_stream.is_same(work.source, cursor):
      raise cursor.changed(work.source)
    state["date"] = before["date"]
  files.write(file, json.dumps(state, indent=1).encode())
  if work.chats is None:
    return cursor, work
  date = datetime.datetime.fromisoformat(state["date"])
  template = dataclasses.replace(work.chats.template, now=date)
  return cursor, dataclasses.replace(work, chats=dataclasses.replace(work.chats, template=template))


def _state(data: DataOptions, work: BlockTokenizer) -> JsonObject:
  """Returns what is stored about a corpus: its settings, its files, and the current date."""
  settings: JsonObject = {f"data.{name}": getattr(data, name) for name in SETTINGS}
  if work.chats is not None:
    template = work.chats.template
    text = f"{template.source}{template.tool_use}{template.tokens}"
    settings["chat template"] = hashlib.sha256(text.encode()).hexdigest()
  return {
    "settings": settings,
    "files": corpus_stream.fingerprint(work.source),
    "date": datetime.datetime.now().isoformat(),
  }


def _check_settings(before: JsonObject, now: JsonObject, folder: str) -> None:
  for key in {**before, **now}:
    if before.get(key) != now.get(key):
      raise InputError(
        f"{folder} was packed with {key}={before.get(key)!r}, but this run has {now.get(key)!r}. "
        f"{ACTION}, or use the settings of the first run."
      )


def _load_cursor(folder: str, row: int) -> Cursor:
  """Returns the cursor of a row, or the beginning of the corpus if it is missing."""
  if not _exists(file := _cursor_file(folder, row)):
    return Cursor()
  fields = json_io.parse_object(files.read(file), file, ACTION)
  return Cursor(**{**fields, "place": sources.Place(*fields["place"])})


def _cursor_file(folder: str, row: int) -> str:
  return files.join(folder, f"{PLACES}/{row:09d}.json")


def _exists(path: str) -> bool:
  return files.info(path) is not None


class _Shards:
  """The shards of a store whose length is not known. The last full one is written in background.

  Args:
    planned: See `pack`.
    folder: The folder of the store.
    limit: The maximum number of rows; 0 for no limit.

  Attributes:
    packed: The number of rows that were written.
  """

  def __init__(self, planned: Manifest, folder: Path, limit: int):
    self._planned, self._folder, self._limit = planned, folder, limit
    self._background = ThreadPoolExecutor(1)
    self._writing: Future[Shard] | None = None
    self._writer: Writer | None = None
    self._found: dict[int, Store] = {}  # the store of the finished shards, by their first rows
    self._ends: dict[int, int] = {}  # of the planned shards, by first row
    self._shard: list[Record] = []
    self.packed = 0

  def __enter__(self) -> _Shards:
    if (found := manifest_lib.find(storage.location(self._folder))) is not None:
      self._open(found.corpus, min(found.total, self._limit or found.total))
    return self

  def __exit__(self, *_: object) -> None:
    self._background.shutdown()
    if self._writer is not None:
      self._writer.close()

  def _open(self, digest: str, rows: int) -> Writer:
    manifest = dataclasses.replace(self._planned, corpus=digest, extents=(rows,))
    self._writer = Writer(self._folder, manifest)
    found = unfinished_store(self._writer)
    self._found = {shard.first: found for shard in found.manifest.shards}
    self._ends = {r.start: r.stop for r in self._writer.manifest.ranges}
    return self._writer

  def resume_at(self) -> int:
    """Returns the first row that is missing."""
    if self._writer is None:
      return 0
    missing = self._writer.missing()
    return missing[0].start if missing else self._writer.manifest.total

  def add(self, row: Record, after: Cursor) -> None:
    """Adds a row, given the cursor after it."""
    self._shard.append(row)
    first = after.row - len(self._shard)
    if after.row == self._ends.get(first, first + self._planned.sequences_per_shard):
      self.flush(after)

  def flush(self, after: Cursor) -> None:
    """Starts writing the rows of the current shard, unless an earlier run has."""
    rows, self._shard = self._shard, []
    self.wait()
    writer = self._writer
    if writer is None:
      writer = self._open(recorder.text_digest(rows[0]), len(rows))
    cursor = json.dumps(dataclasses.asdict(after), indent=1)
    files.write(_cursor_file(writer.folder, after.row), cursor.encode())
    if not rows:
      return
    first = after.row - len(rows)
    if after.row > writer.manifest.total:
      writer.lengthen(after.row)
    if first in self._found:
      recorder.check_same_row(self._found[first], after.row - 1, rows[-1])
    else:
      self._writing = self._background.submit(writer.write_shard, range(first, after.row), rows)
      self.packed += len(rows)

  def wait(self) -> None:
    """Waits for the shard that is being written."""
    if self._writing is not None:
      self._writing.result()
      self._writing = None

  def complete(self) -> Manifest:
    """Completes the store."""
    assert self._writer is not None
    done = self._writer.complete()
    assert done is not None
    return done
