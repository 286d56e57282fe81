"""Recording of stores whose rows are known: what is missing is computed, written and completed.

The caller opens the stores as parts. The teacher is loaded if anything is missing. Of S shards,
each of P processes looks up S/P and writes as many; its memory is that of two batches and of the
shard that is being filled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from distill_jax.cross_tokenizer import summary
from distill_jax.errors import InputError, bad_value
from distill_jax.models.loading import ModelSource
from distill_jax.nn import sharding
from distill_jax.nn.sharding import Rows
from distill_jax.records import batch_plan, recording
from distill_jax.records import manifest as manifest_lib
from distill_jax.records.fields import Record
from distill_jax.records.loaded_teacher import OnStatistics, feature_width
from distill_jax.records.options import RecordsOptions
from distill_jax.records.recording import Corpus
from distill_jax.records.shard_buffer import ShardBuffer
from distill_jax.records.store import Writer, unfinished_store
from distill_jax.records.student_rows import StudentRows
from distill_jax.runtime import distributed, storage
from distill_jax.runtime.progress import Progress
from distill_jax.types import JsonObject

CHECKED_AT_ONCE = 16  # rows that are read to compare a corpus with finished shards


@dataclasses.dataclass(frozen=True)
class Part:
  """A store that a run records.

  Attributes:
    corpus: Its sequences.
    writer: Its writer.
    rows: The rows of a batch.
    missing: The shards that are missing, the same on all processes.
  """

  corpus: Corpus
  writer: Writer
  rows: Rows
  missing: list[range]

  @property
  def tokens(self) -> int:
    """Number of tokens to record."""
    return sum(map(len, self.missing)) * self.corpus.positions


class Teacher(Protocol):
  """A teacher that computes the targets of rows: a LoadedTeacher or a ServedTeacher.

  Attributes:
    on_devices: True if all processes compute together; False if each of them asks servers.
  """

  on_devices: bool

  def recorded(
    self,
    corpus: Corpus,
    plan: Iterable[np.ndarray],
    rows: Rows,
    on_statistics: OnStatistics | None = None,
  ) -> Iterator[tuple[np.ndarray, list[Record]]]:
    """Yields each batch of a plan with its records; see LoadedTeacher.recorded."""


@contextlib.contextmanager
def open_part(
  options: RecordsOptions,
  teacher: ModelSource,
  corpus: Corpus,
  folder: Path,
  mesh: Mesh,
  batch_size: int,
  identity: JsonObject | None = None,
) -> Iterator[Part]:
  """Opens a store for writing.

  Args:
    options: The options of `records`.
    teacher: The teacher. Its digest is that of the store, unless only the rows are stored.
    corpus: The sequences.
    folder: The folder of the store, or the mirror of a URL.
    mesh: The device mesh.
    batch_size: Number of rows of a batch.
    identity: Name and digest of a teacher on servers; None for `teacher`.

  Raises:
    InputError: The folder holds other records.
  """
  if identity is None:
    identity = {} if options.kind == "text" else teacher.identity
  width = feature_width(options, teacher)
  manifest = recording.manifest_of(options, corpus, identity, width)
  manifest = manifest_lib.with_shards_of(storage.location(folder), manifest)
  with Writer(folder, manifest, jax.process_index(), jax.process_count()) as writer:
    _check_same_corpus(writer, corpus)
    yield Part(corpus, writer, sharding.rows(mesh, batch_size), _missing(writer))


def runs_teacher(options: RecordsOptions) -> bool:
  """Returns whether recording runs a model: not for text alone, nor for a served teacher."""
  return options.kind != "text" and not options.logprobs and not options.served


def record(
  verb: str,
  parts: Sequence[Part],
  teacher: Teacher | None,
  mesh: Mesh,
  work: str = "",
) -> None:
  """Records what is missing, and completes one store after the other.

  Args:
    verb: The command.
    parts: The stores.
    teacher: The teacher of all of them; None for rows that are stored without one.
    mesh: The device mesh.
    work: What the lines of progress name; "" for the command.

  Raises:
    InputError: A process of an earlier run has not written its shards, or a row cannot be recorded.
    Unavailable: No server answers.
    Preempted: SIGTERM arrived; finished shards are kept.
  """
  total = sum(part.tokens for part in parts)
  with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
    if total:
      progress = stack.enter_context(Progress(work or verb, total))
      if teacher:
        progress.begin("waits for the teacher")
    for part in parts:
      if part.missing:
        if part is not parts[0]:
          distributed.Preemption.check_late(verb, "finished shards are kept")
        _write_on_all_processes(verb, part, teacher, progress)
      distributed.barrier("recorded")
      distributed.run_on_process_0(functools.partial(_complete, part))


def check_shards(options: RecordsOptions, parts: Sequence[Part]) -> None:
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


def _complete(part: Part) -> None:
  """Finishes the store."""
  writer, rows = part.writer, part.corpus.rows
  if isinstance(rows, StudentRows):
    summary.merge(writer.folder, len(writer.manifest.ranges), rows.tables)
  if writer.complete() is None:
    raise InputError(
      f"{writer.folder} still lacks shards of a process that is not part of this run. Run the "
      "command again with all processes."
    )


def _missing(writer: Writer) -> list[range]:
  """Returns the shards that no process finds finished, so that all processes record the same."""
  ranges, found = writer.manifest.ranges, {shard.first for shard in writer.finished()}
  finished = distributed.max_over_processes(np.array([r.start in found for r in ranges]))
  return [r for r, done in zip(ranges, finished.tolist(), strict=True) if not done]


def _write_on_all_processes(
  verb: str, part: Part, teacher: Teacher | None, progress: Progress
) -> None:
  """Writes the missing shards of a store.

  An error of writing on one process is raised on all. So is every error of processes that do not
  compute together; those that do cannot continue if one of them cannot read its rows.
  """
  written: list[ShardBuffer] = []

  def write() -> None:
    written.append(_write(part, teacher, progress))

  if teacher is not None and teacher.on_devices:
    write()
  else:
    distributed.run_on_all_processes(f"recorded {part.writer.folder}", write)
  distributed.run_on_all_processes(f"written {part.writer.folder}", written[0].check)
  if distributed.max_over_processes(written[0].unfinished):
    raise distributed.Preemption.stop(verb, "finished shards are kept")


def _write(part: Part, teacher: Teacher | None, progress: Progress) -> ShardBuffer:
  """Writes this process's shards of a store while their records are computed.

  A process that cannot write computes with the others until all of them stop, as for SIGTERM.

  Args:
    part: The store.
    teacher: The teacher; None for rows without one.
    progress: Counts the tokens.
  """
  shards = batch_plan.divide(part.missing, part.rows)
  plan, own = batch_plan.batches(shards, part.rows), shards.get(part.rows.process, [])
  if teacher is None:
    batches = _without_targets(part, plan)
  else:
    on_statistics = None
    if isinstance(part.corpus.rows, StudentRows):
      on_statistics = summary.ShardStatistics(part.writer.folder, part.writer.manifest.ranges).add
    batches = teacher.recorded(part.corpus, plan, part.rows, on_statistics)
  buffer = ShardBuffer(part.writer, own, on_error=distributed.Preemption.request)
  with buffer, distributed.Preemption() as preemption:
    for index_B, records in batches:
      buffer.add(records)
      progress.add(int((index_B != batch_plan.PADDING).sum()) * part.corpus.positions)
      if preemption.reached():
        break
  return buffer


def _without_targets(
  part: Part, plan: Iterable[np.ndarray]
) -> Iterator[tuple[np.ndarray, list[Record]]]:
  """Yields the batches of a plan, with the rows that this process writes."""
  for index_B in plan:
    yield index_B, [part.corpus.rows[i] for i in batch_plan.written(index_B, part.rows)]


def _check_same_corpus(writer: Writer, corpus: Corpus) -> None:
  """Raises InputError if the finished shards in a folder were recorded from another corpus.

  Each process compares the last rows of the shards that it looks up, several at once.
  """
  store, errors = unfinished_store(writer), []
  with ThreadPoolExecutor(CHECKED_AT_ONCE) as pool:
    lasts = [shard.first + shard.count - 1 for shard in store.manifest.shards]
    try:
      list(pool.map(lambda i: recording.check_same_row(store, i, corpus.rows[i]), lasts))
    except InputError as e:
      errors.append(e)
  if distributed.max_over_processes(len(errors)):
    elsewhere = f"{store.folder} was recorded from another corpus, as another process reports."
    raise errors[0] if errors else InputError(f"{elsewhere} Choose another folder.")
