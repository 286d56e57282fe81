"""Packing of a corpus into stores of text, which `record` and `train` read by index.

Blocks of the corpus are tokenized by a pool of processes and packed in order, so the bytes of the
stores do not depend on the number of processes. Each length of rows has a store, and one pass over
the corpus fills all of them. Memory holds a window of documents (packing.BestFitPacker), a few
blocks, and for each length a shard that is filled and one that is written, whatever the size of the
corpus.

A run that was stopped continues at the first place that one of the stores needs; see packed_shards.
Rows from there on that are already stored are compared. So what is read again is at most a window,
and with several lengths, the part of the corpus that filled the unfinished shard of the rarest
length: 100 million tokens for a length with 1% of them and shards of a million tokens. If the files
of the corpus have changed, the part before is read again, too, and compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from distill_jax.data import corpus, corpus_stream, packing
from distill_jax.data.block_tokenizer import BlockTokenizer
from distill_jax.data.corpus_stream import CorpusStream, Cursor
from distill_jax.data.options import DataOptions
from distill_jax.errors import InputError
from distill_jax.records import manifest as manifest_lib
from distill_jax.records.manifest import Manifest
from distill_jax.records.packed_shards import PackedShards
from distill_jax.runtime import files, json_io, storage
from distill_jax.runtime.distributed import Preemption
from distill_jax.runtime.progress import Progress
from distill_jax.types import JsonObject

STATE = "packing.json"
ACTION = "Pack into another folder"
# The settings that decide the rows of a corpus, besides those in the manifest.
SETTINGS = ("kind", "split", "field", "heldout_fraction", "on_bad", "trust")


def pack(
  data: DataOptions,
  work: BlockTokenizer,
  planned: Sequence[Manifest],
  folder: Path,
  workers: int = 1,
) -> tuple[dict[int, Manifest], int]:
  """Packs a corpus into stores. Shards that are finished are kept.

  Args:
    data: The config section `data`.
    work: What tokenizes the corpus, from `corpus.block_tokenizer`.
    planned: The manifest of each length of rows, in ascending order. Their corpus and extents are
      replaced by those of the rows.
    folder: The folder of the run. The stores are in its data.folder_of_length.
    workers: The number of processes that tokenize; 0 for one per core.

  Returns:
    The manifests of the finished stores that have rows, by length, and the number of rows that this
    call packed.

  Raises:
    InputError: The corpus cannot be used, or has changed since it was partly packed, or the folder
      holds other records.
    Preempted: SIGTERM was received; finished shards are kept.
  """
  where, names = storage.location(folder), data.folder_of_length
  before = _before(where)
  with contextlib.ExitStack() as stack:
    stores = {
      length: stack.enter_context(PackedShards(manifest, folder / name))
      for (length, name), manifest in zip(names.items(), planned, strict=True)
    }
    try:
      cursor, work = _resume(data, work, where, before, list(stores.values()))
      if not (cursor.is_end or _is_full(data, {n: s.missing for n, s in stores.items()})):
        _write(CorpusStream(work, corpus.packer(data), workers, cursor), stores, data)
    except InputError:
      if before is None and not any(store.total for store in stores.values()):
        files.remove(files.join(where, STATE))  # so that a corrected command can use the folder
      raise
    done = {length: store.complete() for length, store in stores.items()}
    packed = sum(store.packed for store in stores.values())
  return {length: manifest for length, manifest in done.items() if manifest}, packed


def _is_full(data: DataOptions, rows_of: Mapping[int, int]) -> bool:
  """Returns True if data.sequences leaves no space for another row of the largest length."""
  tokens = sum(length * rows for length, rows in rows_of.items())
  return 0 < data.sequences * data.seq_len < tokens + data.seq_len


def _write(stream: CorpusStream, stores: Mapping[int, PackedShards], data: DataOptions) -> None:
  """Writes the rows of a stream, and compares those that are already stored."""
  alone = jax.process_count() == 1  # otherwise, the other processes wait for this one
  before, limit = sum(s.missing for s in stores.values()), 0 if data.buckets else data.sequences
  with (
    contextlib.closing(stream.rows()) as rows,
    Progress("pack", limit or None, "sequences", before) as progress,
    Preemption() as preemption,
  ):
    for row in rows:
      length, record = len(row.tokens_T), corpus.record(row, data)
      store, stop = stores[length], stream.rows_of[length]
      if stop > store.missing:
        store.add(stop, record, stream.end)
        progress.add(1)
      elif not store.is_same(stop - 1, record):
        raise corpus_stream.changed(stream.source, before)
      if alone and preemption.reached():
        for store in stores.values():
          store.wait()
        raise Preemption.stop("pack", "finished shards are kept")
      if _is_full(data, stream.rows_of):
        break
  for length, store in stores.items():
    store.flush(stream.rows_of[length], stream.end)
  for store in stores.values():
    store.wait()


def _before(folder: str) -> JsonObject | None:
  """Returns the state of an earlier run that has begun a store, or None."""
  if not _exists(file := files.join(folder, STATE)):
    return None
  before = json_io.parse_object(files.read(file), file, ACTION)
  of_lengths = [files.join(folder, str(n)) for n in before["settings"].get("lengths", ())]
  begun = any(_exists(files.join(f, manifest_lib.NAME)) for f in (folder, *of_lengths))
  return before if begun else None


def _resume(
  data: DataOptions,
  work: BlockTokenizer,
  folder: str,
  before: JsonObject | None,
  stores: Sequence[PackedShards],
) -> tuple[Cursor, BlockTokenizer]:
  """Returns the cursor at which to continue, and `work` with the date on which packing began.

  Args:
    data: The config section `data`.
    work: What tokenizes the corpus.
    folder: The path or URL of the run.
    before: The state of an earlier run, or None.
    stores: The stores.

  Raises:
    InputError: The settings or the corpus have changed.
  """
  state, cursor = _state(data, work), Cursor()
  if before is not None:
    _check_settings(before["settings"], state["settings"], folder)
    _check_total(data, folder, stores)
    cursor = min((s.cursor() for s in stores), key=lambda c: (sum(c.rows), c.is_end))
    changed = cursor.rows and before["files"] != state["files"]
    if changed and not corpus_stream.is_same(work.source, cursor):
      raise corpus_stream.changed(work.source, sum(cursor.rows))
    state["date"] = before["date"]
  files.write(files.join(folder, STATE), json.dumps(state, indent=1).encode())
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
  if isinstance(packer := corpus.packer(data), packing.BestFitPacker):
    settings["packing"] = f"best fit in windows of {packing.WINDOW_ROWS} rows"
    settings["lengths"] = list(packer.lengths)
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


def _check_total(data: DataOptions, folder: str, stores: Sequence[PackedShards]) -> None:
  """Raises InputError if the stores hold more rows than data.sequences."""
  tokens = sum(store.total * store.length for store in stores)
  if 0 < data.sequences * data.seq_len < tokens:
    raise InputError(
      f"{folder} holds {tokens / data.seq_len:g} sequences, but this run packs {data.sequences}. "
      "Stores can only be extended; choose another folder."
    )


def _exists(path: str) -> bool:
  return files.info(path) is not None
