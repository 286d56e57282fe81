"""Runs the teacher over the corpus once and stores its outputs for training.

Students are trained on this store, without the teacher. Each token takes a few dozen bytes: a
sample or the top-k of the teacher's distribution (records.kind). Finished shards are skipped when
the command is run again. records.logprobs imports the outputs of a served teacher instead.

With records.heldout_sequences, rows of the held-out split are recorded too, and with data.buckets
each length of sequences has a store; the teacher is loaded once for all of them. Text is read from
stores that `pack` made (data.packed), or is packed into WORKDIR/packed first. With
records.student_tokenizer, the store is in the tokens of a student with another tokenizer.

Reads: the teacher (`teacher`), and the corpus in `data` or the examples of `tasks`.

Writes: a store in the workdir: manifest.json and shards (*.array_record); with data.buckets, a
store in the folder of each length, e.g. WORKDIR/4096. Held-out rows are in WORKDIR/heldout.

Config: seed, mesh, teacher, data, pack, records, retarget, tasks.

Example:
  distill-jax record --config=configs/demo.py --workdir=runs/demo/records
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from distill_jax.commands import pack
from distill_jax.config import Config
from distill_jax.errors import InputError, bad_value
from distill_jax.models import loading, long_context
from distill_jax.models.loading import ModelSource
from distill_jax.nn import sharding
from distill_jax.nn.sharding import Rows
from distill_jax.records import (
  batch_plan,
  collate,
  planned_stores,
  recorder,
  served_store,
  student_corpus,
  tap_features,
)
from distill_jax.records import manifest as manifest_lib
from distill_jax.records.fields import Record
from distill_jax.records.loaded_teacher import LoadedTeacher, feature_width
from distill_jax.records.manifest import Manifest
from distill_jax.records.options import RecordsOptions
from distill_jax.records.recorder import Corpus
from distill_jax.records.shard_buffer import ShardBuffer
from distill_jax.records.store import Writer, unfinished_store
from distill_jax.records.student_rows import StudentRows
from distill_jax.retarget import summary
from distill_jax.runtime import distributed, storage
from distill_jax.runtime.progress import Progress
from distill_jax.tasks import dataset
from distill_jax.types import JsonObject

PACKED = "packed"  # the folder of the text in the workdir
CHECKED_AT_ONCE = 16  # rows that are read to compare a corpus with finished shards


@dataclasses.dataclass(frozen=True)
class _Part:
  """A store that this run records.

  Attributes:
    split: The folder of its split in the workdir; "" for the training rows.
    length: The folder of its length in that of the split; "" without data.buckets.
    corpus: Its sequences.
    writer: Its writer.
    rows: The rows of a batch.
    missing: The shards that are missing, the same on all processes.
  """

  split: str
  length: str
  corpus: Corpus
  writer: Writer
  rows: Rows
  missing: list[range]

  @property
  def tokens(self) -> int:
    """Number of tokens to record."""
    return sum(map(len, self.missing)) * self.corpus.positions


def run(config: Config, folder: Path) -> JsonObject:
  """Writes the stores of a corpus into `folder`; finished shards are skipped.

  Returns:
    sequences, tokens, entries and bytes of the stores of all lengths together, and recorded_now,
    the number of sequences that this call recorded; tokens, entries and bytes on process 0 only.
    With data.buckets also LENGTH/sequences, the number of sequences of a length. Those of held-out
    rows begin with heldout/, e.g. heldout/sequences.

  Raises:
    InputError: Teacher, tokenizer and corpus do not fit together, or the folder contains other
      records. It is raised before anything is compiled.
  """
  teacher = loading.open_source(config.teacher, config.seed)
  student_corpus.check(config)
  planned = planned_stores.planned(config)
  if not config.tasks and not runs_teacher(config.records):
    stored = {split: _store_text(c, teacher, folder / split) for split, c in planned.items()}
    return planned_stores.flat({split: _sizes(*of_split) for split, of_split in stored.items()})
  mesh = sharding.make_mesh(**vars(config.mesh))
  if runs_teacher(config.records):
    sharding.shardings(teacher.abstract, mesh, teacher.compute.rules)  # raises if it cannot be
  options = config.records
  tap_features.check(options, of_task=bool(config.tasks))
  sharding.check_batch("records.batch_size", options.batch_size, mesh)
  positions = long_context.positions(config.data)
  long_context.check(mesh, positions, [teacher], of_tasks=bool(config.tasks))
  teacher.check_digest()
  packed = folder / PACKED
  corpora = {split: open_corpora(c, teacher, packed / split) for split, c in planned.items()}
  _check_held_out(corpora)
  if config.records.student_tokenizer:
    corpora = student_corpus.corpora(config, teacher, corpora)
  with contextlib.ExitStack() as stack:
    parts = []
    for split, by_length in corpora.items():
      for length, corpus in by_length.items():
        writer = stack.enter_context(_writer(config, teacher, corpus, folder / split / length))
        _check_same_corpus(writer, corpus)
        rows = sharding.rows(mesh, _batch_size(config, corpus))
        parts.append(_Part(split, length, corpus, writer, rows, _missing(writer)))
    _check_shards(options, parts)
    _record(config, teacher, parts, mesh)
  sizes = {}
  for split in planned:
    made = {part.length: part for part in parts if part.split == split}
    now = sum(len(shard) for part in made.values() for shard in part.missing)
    sizes[split] = _sizes({name: part.writer.manifest for name, part in made.items()}, now)
  return planned_stores.flat(sizes)


def _batch_size(config: Config, corpus: Corpus) -> int:
  """Returns the number of rows of a batch, whose tokens are those of the longest sequences."""
  size = config.records.batch_size
  return size if corpus.is_task else size * config.data.seq_len // corpus.teacher_positions


def _record(config: Config, teacher: ModelSource, parts: Sequence[_Part], mesh: Mesh) -> None:
  """Records what is missing, and completes one store after the other."""
  total, steps = sum(part.tokens for part in parts), itertools.count()
  with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
    if total:
      progress = stack.enter_context(Progress("record", total, "tokens"))
      loaded = _load(config, teacher, parts[0].corpus, mesh)
    for part in parts:
      if part.missing:
        _write(part, loaded, progress, steps)
      distributed.barrier("recorded")
      distributed.run_on_process_0(functools.partial(_complete, part))


def _load(config: Config, teacher: ModelSource, corpus: Corpus, mesh: Mesh) -> LoadedTeacher | None:
  """Loads the teacher; returns None if none runs."""
  if not runs_teacher(config.records):
    return None
  return LoadedTeacher(config, teacher, mesh, corpus, _reader(config))


def _sizes(stores: Mapping[str, Manifest], recorded_now: int) -> JsonObject:
  """Returns the sizes of the stores of a split, by length."""
  sizes = planned_stores.sizes(stores, ("tokens", "entries", "bytes"))
  return sizes | {"recorded_now": recorded_now}


def _writer(config: Config, teacher: ModelSource, corpus: Corpus, folder: Path) -> Writer:
  """Returns the writer of a store."""
  options = config.records
  identity = {} if options.kind == "text" else teacher.identity
  width = feature_width(options, teacher)
  manifest = recorder.manifest_of(options, corpus, identity, width)
  manifest = manifest_lib.with_shards_of(storage.location(folder), manifest)
  return Writer(folder, manifest, jax.process_index(), jax.process_count())


def _complete(part: _Part) -> None:
  """Finishes the store."""
  writer, rows = part.writer, part.corpus.rows
  if isinstance(rows, StudentRows):
    summary.merge(writer.folder, len(writer.manifest.ranges), rows.tables)
  if writer.complete() is None:
    raise InputError(
      f"{writer.folder} still lacks shards of a process that is not part of this run. Run the "
      "command again with all processes."
    )


def runs_teacher(options: RecordsOptions) -> bool:
  """Returns whether recording runs a model: not for text alone, nor for a served teacher's dump."""
  return options.kind != "text" and not options.logprobs


def _store_text(
  config: Config, teacher: ModelSource, folder: Path
) -> tuple[dict[str, Manifest], int]:
  """Writes stores that need no model: of packed text, or of a served teacher's outputs.

  Returns:
    The manifests by length, "" without data.buckets, and the number of sequences that this process
    stored.
  """
  if config.records.logprobs:
    manifest, now = served_store.make(config, teacher, folder)
    return {"": manifest}, now
  if config.data.packed:
    expected = "'' with records.kind='text', because `train` reads that store"
    action = "Add it to train.records instead of recording"
    raise bad_value("data.packed", config.data.packed, expected, action)
  stores, now = pack.make(config, teacher, folder)
  return {config.data.folder_of_length[n]: s.manifest for n, s in stores.items()}, now


def open_corpora(config: Config, teacher: ModelSource, packed: Path) -> dict[str, Corpus]:
  """Opens the text or the task of a config.

  Args:
    config: The config.
    teacher: The teacher.
    packed: The folder in which text is packed.

  Returns:
    The corpora by length; the key of one without data.buckets, and of a task, is "".

  Raises:
    InputError: The data does not exist, or the teacher cannot read it.
  """
  pretrained, data = teacher.pretrained, config.data
  if config.tasks:
    recorded = config.records.kind != "text"
    return {"": dataset.open_corpus(config, pretrained, teacher.config if recorded else None)}
  rows_of, tokenizer = pack.open_rows(config, teacher, packed)
  return {
    data.folder_of_length[n]: Corpus.of_text(rows, tokenizer, n, data.fraction_of_split)
    for n, rows in rows_of.items()
  }


def _missing(writer: Writer) -> list[range]:
  """Returns the shards that no process finds finished, so that all processes record the same."""
  ranges, found = writer.manifest.ranges, {shard.first for shard in writer.finished()}
  finished = distributed.max_over_processes(np.array([r.start in found for r in ranges]))
  return [r for r, done in zip(ranges, finished.tolist(), strict=True) if not done]


def _reader(config: Config) -> collate.Read | None:
  """Returns the function that reads batches of the recorded task; None for text."""
  if not config.tasks:
    return None
  name = dataset.recorded_task(config)
  return dataset.reader({name: config.tasks[name]})


def _write(
  part: _Part, teacher: LoadedTeacher | None, progress: Progress, steps: Iterator[int]
) -> None:
  """Writes this process's shards of a store while their records are computed.

  Args:
    part: The store.
    teacher: The teacher; None for a task without one.
    progress: Counts the tokens.
    steps: Numbers the batches of the run.
  """
  shards = batch_plan.divide(part.missing, part.rows)
  plan, own = batch_plan.batches(shards, part.rows), shards.get(part.rows.process, [])
  if teacher is None:
    batches = _without_targets(part, plan)
  else:
    see = None
    if isinstance(part.corpus.rows, StudentRows):
      see = summary.ShardStatistics(part.writer.folder, part.writer.manifest.ranges).add
    batches = teacher.recorded(part.corpus, plan, part.rows, see)
  with ShardBuffer(part.writer, own) as buffer, distributed.Preemption() as preemption:
    for index_B, records in batches:
      buffer.add(records)
      progress.add(int((index_B != batch_plan.PADDING).sum()) * part.corpus.positions)
      if preemption.reached(next(steps)):
        break
  if distributed.max_over_processes(buffer.unfinished):
    raise distributed.Preemption.stop("record", "finished shards are kept")


def _without_targets(
  part: _Part, plan: Iterable[np.ndarray]
) -> Iterator[tuple[np.ndarray, list[Record]]]:
  """Yields the batches of a plan, with the rows that this process writes."""
  for index_B in plan:
    own = index_B[part.rows.written]
    yield index_B, [part.corpus.rows[i] for i in own[own != batch_plan.PADDING].tolist()]


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


def _check_held_out(corpora: Mapping[str, Mapping[str, Corpus]]) -> None:
  """Raises InputError if the held-out rows are rows to train on, given the corpora by split."""
  trained_on = {corpus.digest for corpus in corpora[""].values()}
  heldout = corpora.get(planned_stores.HELDOUT, {})
  if any(corpus.digest in trained_on for corpus in heldout.values()):
    raise InputError(
      "The held-out rows are the rows to train on. Name held-out data, or set "
      "records.heldout_sequences=0."
    )


def _check_shards(options: RecordsOptions, parts: list[_Part]) -> None:
  """Raises InputError if the largest store has too few shards for all processes to write.

  Of a smaller store, e.g. of held-out rows, some processes may write none: all then wait for the
  time of at most one shard, which is less than that of one shard per process in the largest store.
  """
  writers = len(np.unique(parts[0].rows.writer_B))
  if writers > (shards := max(len(part.writer.manifest.ranges) for part in parts)):
    raise bad_value(
      "records.tokens_per_shard",
      options.tokens_per_shard,
      f"a size that makes at least {writers} shards, one for each process that writes, instead of "
      f"{shards}",
      "Lower it, or start fewer processes",
    )
