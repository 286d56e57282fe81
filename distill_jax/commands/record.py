"""Runs the teacher over the corpus once and stores its outputs for training.

Students are trained on this store, without the teacher. Each token takes a few dozen bytes: a
sample or the top-k of the teacher's distribution (records.kind). Finished shards are skipped when
the command is run again. records.logprobs imports the outputs of a served teacher instead.

Text is read from a store that `pack` made (data.packed), or is packed into WORKDIR/packed first.

Reads: the teacher (`teacher`), and the corpus in `data` or the examples of `tasks`.

Writes: a store in the workdir: manifest.json and shards (*.array_record).

Config: seed, mesh, teacher, data, pack, records, tasks.

Example:
  distill-jax record --config=configs/demo.py --workdir=runs/demo/records
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from distill_jax.commands import pack
from distill_jax.config import Config
from distill_jax.data import corpus as text_corpus
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError, bad_value
from distill_jax.models import loading, runs
from distill_jax.models.loading import ModelSource
from distill_jax.nn import sharding
from distill_jax.records import batch_plan, collate, import_logprobs, recorder, tap_features
from distill_jax.records import manifest as manifest_lib
from distill_jax.records.growing_store import GrowingStore
from distill_jax.records.manifest import Manifest
from distill_jax.records.options import RecordsOptions
from distill_jax.records.recorder import Corpus, Record, TeacherPass
from distill_jax.records.shard_buffer import ShardBuffer
from distill_jax.records.store import Writer, unfinished_store
from distill_jax.runtime import distributed, files, storage
from distill_jax.runtime.progress import Progress
from distill_jax.tasks import dataset
from distill_jax.types import JsonObject

PACKED = "packed"  # the folder of the text in the workdir
CHECKED_AT_ONCE = 16  # rows that are read to compare a corpus with finished shards


def run(config: Config, folder: Path) -> JsonObject:
  """Writes the store of a corpus into `folder`; finished shards are skipped.

  Returns:
    sequences, tokens, entries and bytes of the whole store, and recorded_now, the number of
    sequences that this call recorded; tokens, entries and bytes on process 0 only.

  Raises:
    InputError: Teacher, tokenizer and corpus do not fit together, or the folder contains other
      records. It is raised before anything is compiled.
  """
  teacher = loading.open_source(config.teacher, config.seed)
  if not config.tasks and not runs_teacher(config.records):
    return _store_text(config, teacher, folder)
  mesh = sharding.make_mesh(**vars(config.mesh))
  if runs_teacher(config.records):
    sharding.shardings(teacher.abstract, mesh, teacher.compute.rules)  # raises if it cannot be
  options = config.records
  _check(options, of_task=bool(config.tasks))
  sharding.check_batch("records.batch_size", options.batch_size, mesh)
  teacher.check_digest()
  corpus = open_corpus(config, teacher, folder)
  width = feature_width(options, teacher)
  manifest = recorder.manifest_of(options, corpus, _identity(options, teacher), width)
  manifest = manifest_lib.with_shards_of(storage.location(folder), manifest)
  rows = sharding.rows(mesh, options.batch_size)
  if (writers := len(np.unique(rows.writer_B))) > len(manifest.ranges):
    raise bad_value(
      "records.tokens_per_shard",
      options.tokens_per_shard,
      f"a size that makes at least {writers} shards, one for each process that writes, instead of "
      f"{len(manifest.ranges)}",
      "Lower it, or start fewer processes",
    )
  done: list[Manifest] = []
  with Writer(folder, manifest, jax.process_index(), jax.process_count()) as writer:
    _check_same_corpus(writer, corpus)
    missing = _missing(writer)
    if missing:
      shards = batch_plan.divide(missing, rows)
      with jax.set_mesh(mesh):
        batches = _batches(config, teacher, corpus, batch_plan.batches(shards, rows), mesh)
        with Progress("record", sum(map(len, missing)) * corpus.positions, "tokens") as progress:
          _write(batches, shards.get(rows.process, []), writer, progress, corpus.positions)
    distributed.barrier("recorded")
    distributed.run_on_process_0(lambda: done.append(_complete(writer)))
  sums = {
    k: sum(getattr(s, k) for m in done for s in m.shards) for k in ("tokens", "entries", "bytes")
  }
  return {"sequences": manifest.total, "recorded_now": sum(map(len, missing)), **sums}


def _complete(writer: Writer) -> Manifest:
  """Finishes the store."""
  if (done := writer.complete()) is None:
    raise InputError(
      f"{writer.folder} still lacks shards of a process that is not part of this run. Run the "
      "command again with all processes."
    )
  return done


def runs_teacher(options: RecordsOptions) -> bool:
  """Returns whether recording runs a model: not for text alone, nor for a served teacher's dump."""
  return options.kind != "text" and not options.logprobs


def _store_text(config: Config, teacher: ModelSource, folder: Path) -> JsonObject:
  """Writes a store that needs no model: of packed text, or of a served teacher's outputs."""
  if config.records.logprobs:
    done, now = _import(config, teacher, folder)
  elif config.data.packed:
    expected = "'' with records.kind='text', because `train` reads that store"
    action = "Add it to train.records instead of recording"
    raise bad_value("data.packed", config.data.packed, expected, action)
  else:
    store, now = pack.make(config, teacher, folder)
    done = store.manifest
  sums = {k: sum(getattr(s, k) for s in done.shards) for k in ("tokens", "entries", "bytes")}
  return {"sequences": done.total, "recorded_now": now, **sums}


def open_corpus(config: Config, teacher: ModelSource, folder: Path) -> Corpus:
  """Opens the text or the task of a config.

  Args:
    config: The config.
    teacher: The teacher.
    folder: The workdir, in which text is packed.

  Raises:
    InputError: The data does not exist, or the teacher cannot read it.
  """
  pretrained = teacher.pretrained
  if config.tasks:
    recorded = config.records.kind != "text"
    return dataset.open_corpus(config, pretrained, teacher.config if recorded else None)
  rows, tokenizer = pack.open_rows(config, teacher, folder / PACKED)
  return Corpus.of_text(rows, tokenizer, config.data.seq_len)


def feature_width(options: RecordsOptions, teacher: ModelSource) -> int:
  """Returns the size of the teacher's recorded feature vectors; 0 without taps."""
  return tap_features.feature_width(teacher.config, options.tap_kind) if options.taps else 0


def _missing(writer: Writer) -> list[range]:
  """Returns the shards that no process finds finished, so that all processes record the same."""
  ranges, found = writer.manifest.ranges, {shard.first for shard in writer.finished()}
  finished = distributed.max_over_processes(np.array([r.start in found for r in ranges]))
  return [r for r, done in zip(ranges, finished.tolist(), strict=True) if not done]


def _batches(
  config: Config, teacher: ModelSource, corpus: Corpus, plan: Iterable[np.ndarray], mesh: Mesh
) -> Iterator[tuple[np.ndarray, list[Record]]]:
  """Yields the batches of a plan (see batch_plan), with the records that this process writes.

  The teacher computes the next batch while one is read.
  """
  rows = sharding.rows(mesh, config.records.batch_size)
  if runs_teacher(config.records):
    yield from recorder.recorded(dispatcher(config, teacher, corpus, mesh), plan, rows)
    return
  for index_B in plan:
    own = index_B[rows.written]
    yield index_B, [corpus.rows[i] for i in own[own != batch_plan.PADDING].tolist()]


def dispatcher(
  config: Config, teacher: ModelSource, corpus: Corpus, mesh: Mesh
) -> Callable[[np.ndarray], tuple[list[Record], dict[str, jax.Array]]]:
  """Loads the teacher; returns a function that starts its computation on a batch of a plan.

  The function returns the rows that this process holds, and the targets of the global batch.
  """
  keys, options = runs.keys(config.seed), config.records
  loaded = teacher.load(mesh, keys["teacher"])
  width = feature_width(options, teacher)
  run = TeacherPass(options, loaded.compute, corpus.classes, corpus.first_class, width).jitted
  rows = sharding.rows(mesh, options.batch_size)
  read = _reader(config)
  padding = {name: np.zeros_like(x) for name, x in corpus.rows[0].items()}

  def dispatch(index_B: np.ndarray) -> tuple[list[Record], dict[str, jax.Array]]:
    own_B = index_B[rows.held]
    kept = iter(corpus.read(own_B[own_B != batch_plan.PADDING].tolist()))
    held = [padding if i == batch_plan.PADDING else next(kept) for i in own_B.tolist()]
    own = collate.collate(held, read=read), np.maximum(own_B, 0).astype(np.int32)
    batch, index_B = collate.to_device(own, rows)
    return held, run(loaded.model, keys["records"], batch, index_B)

  return dispatch


def _reader(config: Config) -> collate.Read | None:
  """Returns the function that reads batches of the recorded task; None for text."""
  if not config.tasks:
    return None
  name = dataset.recorded_task(config)
  return dataset.reader({name: config.tasks[name]})


def _write(
  batches: Iterable[tuple[np.ndarray, list[Record]]],
  shards: list[range],
  writer: Writer,
  progress: Progress,
  positions: int,
) -> None:
  """Writes this process's shards while their records are computed."""
  with ShardBuffer(writer, shards) as buffer, distributed.Preemption() as preemption:
    for n, (index_B, records) in enumerate(batches):
      buffer.add(records)
      progress.add(int((index_B != batch_plan.PADDING).sum()) * positions)
      if preemption.reached(n):
        break
  if distributed.max_over_processes(buffer.unfinished):
    raise distributed.Preemption.stop("record", "finished shards are kept")


def _identity(options: RecordsOptions, teacher: ModelSource) -> JsonObject:
  """Returns the teacher's name and digest, for the manifest."""
  if options.kind == "text":
    return {}
  return teacher.identity


def _import(config: Config, teacher: ModelSource, folder: Path) -> tuple[Manifest, int]:
  """Stores a served teacher's responses on process 0, one shard at a time.

  Returns:
    The manifest, and the number of sequences that this process stored.
  """
  tokenizer = text_corpus.tokenizer_of(config.data, teacher.pretrained)
  planned = recorder.planned_manifest(
    config.records, tokenizer.vocab_size, 1, config.data.seq_len, feature_width=0
  )
  identity = {"name": config.records.logprobs_format, "digest": "unknown: behind a server"}
  planned = dataclasses.replace(planned, teacher=identity, tokenizer=tokenizer.digest)
  planned = manifest_lib.with_shards_of(storage.location(folder), planned)
  stored: list[int] = []

  def import_rows() -> None:
    with contextlib.closing(GrowingStore(folder, planned, None)) as store:
      for n, row in enumerate(_dump(config, tokenizer)):
        stored.append(not store.stored(n, [row])[0])
        store.add([row])
      store.finish()

  distributed.run_on_process_0(import_rows)
  return manifest_lib.load(storage.location(folder)), sum(stored)


def _dump(config: Config, tokenizer: Tokenizer) -> Iterator[Record]:
  """Reads a served teacher's responses with their log-probabilities."""
  c = config.records
  if files.info(c.logprobs) is None and not files.listing(c.logprobs, "*.jsonl"):
    expected = "an existing JSONL file or folder of them"
    raise bad_value("records.logprobs", c.logprobs, expected, "Correct the path")
  if c.kind != "topk":
    expected = "'topk' with records.logprobs, because servers return the top log-probabilities"
    raise bad_value("records.kind", c.kind, expected, "Set it to 'topk'")

  def token_id(token: str) -> int | None:
    ids = tokenizer.encode(token)
    return ids[0] if len(ids) == 1 else tokenizer.token_id(token)

  return import_logprobs.sequences(
    c.logprobs,
    c.logprobs_format,
    n=c.n,
    seq_len=config.data.seq_len,
    token_id=token_id,
    vocab_size=tokenizer.vocab_size,
    missing_mass=c.missing_mass,
  )


def _check(c: RecordsOptions, of_task: bool) -> None:
  """Raises InputError for options that records do not support."""
  if of_task and c.taps:
    action = "Remove the key, and set train.online=True for losses that compare features"
    raise bad_value("records.taps", c.taps, "() with tasks, whose features are not stored", action)
  if c.tap_kind not in ("hidden", "qkv"):
    raise bad_value("records.tap_kind", c.tap_kind, "'hidden' or 'qkv'", "Choose one of them")
  if c.tap_kind == "qkv" and c.taps_width:
    expected = "0 with records.tap_kind='qkv', which is not projected"
    raise bad_value("records.taps_width", c.taps_width, expected, "Remove the key")
  if c.tap_kind == "qkv" and 0 in c.taps:
    expected = "layers from 1 with records.tap_kind='qkv', because 0 is the embedding"
    raise bad_value("records.taps", c.taps, expected, "Remove layer 0")
  if c.taps_width and not c.taps:
    expected = "0 without records.taps"
    raise bad_value("records.taps_width", c.taps_width, expected, "Add layers to records.taps")


def _check_same_corpus(writer: Writer, corpus: Corpus) -> None:
  """Raises InputError if the finished shards in a folder were recorded from another corpus.

  Each process compares the last rows of the shards that it looks up, several at once.
  """
  store, errors = unfinished_store(writer), []
  with ThreadPoolExecutor(CHECKED_AT_ONCE) as pool:
    lasts = [shard.first + shard.count - 1 for shard in store.manifest.shards]
    try:
      list(pool.map(lambda i: recorder.check_same_row(store, i, corpus.rows[i]), lasts))
    except InputError as e:
      errors.append(e)
  if distributed.max_over_processes(len(errors)):
    elsewhere = f"{store.folder} was recorded from another corpus, as another process reports."
    raise errors[0] if errors else InputError(f"{elsewhere} Choose another folder.")
