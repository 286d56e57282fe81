"""A run of `retarget`: its stores, the manifests of the result, and the pool that converts shards.

Shards are converted by a pool of processes, and several machines may take slices of them. The
result does not depend on either, nor on interruptions: a finished shard is registered and never
written again, and a shard that was begun is converted again.

Each process holds the tables, both tokenizers and one batch of rows: together 130 MB for
vocabularies of 49,152 and 32,000 tokens and rows of 512. A start reads the manifests, the sample of
each store, and what records/writer.py states.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path

from distill_jax.config import Config
from distill_jax.cross_tokenizer import summary
from distill_jax.cross_tokenizer.sides import pair_tables
from distill_jax.cross_tokenizer.student_lengths import Rows, student_lengths
from distill_jax.errors import InputError
from distill_jax.records.manifest import Manifest
from distill_jax.records.store import Store
from distill_jax.records.writer import Writer
from distill_jax.retarget import convert, sample, source
from distill_jax.retarget.convert import Conversion, Work
from distill_jax.retarget.options import RetargetOptions
from distill_jax.runtime import distributed, slices
from distill_jax.runtime.progress import Progress
from distill_jax.runtime.worker_pool import Pool
from distill_jax.types import JsonObject


@dataclasses.dataclass(frozen=True)
class Job:
  """The stores of a run, by their folders in the workdir; "" is the workdir itself.

  Attributes:
    options: The config section `retarget`.
    conversion: How rows are converted.
    stores: The stores in the teacher's tokens.
  """

  options: RetargetOptions
  conversion: Conversion
  stores: Mapping[str, Store]

  @classmethod
  def of(cls, config: Config) -> Job:
    """Opens the stores and the tokenizers of a config, and builds the tables.

    Raises:
      InputError: A store cannot be converted, or the tokenizers do not fit.
    """
    options = config.retarget
    slices.parse("retarget.slice", options.slice)  # raises
    stores = source.open_stores(config)
    student, teacher = source.student_side(config), source.teacher_side(config, stores)
    tables = pair_tables(teacher, student, options.roles)
    return cls(options, Conversion(tables, config.seed, options.min_mass), stores)

  @property
  def workers(self) -> int:
    """The number of processes."""
    return self.options.workers or len(os.sched_getaffinity(0))

  @functools.cached_property
  def lengths(self) -> dict[str, int]:
    """The length of the student's rows of each store; see `student_lengths`."""
    rows = {
      name: Rows(store, store.manifest.seq_len, str(store.folder))
      for name, store in self.stores.items()
    }
    return student_lengths(self.conversion.tables, rows, self.options.seq_len)

  def target(self, name: str) -> Manifest:
    """Returns the manifest of a store in the student's tokens."""
    store, tables = self.stores[name], self.conversion.tables
    m = store.manifest
    return dataclasses.replace(
      m,
      vocab_size=tables.student.size,
      seq_len=self.lengths[name],
      tokenizer=tables.student.digest,
      logp=False,
      extents=(m.total,),
      shards=(),
      retargeted={
        "tokenizer": tables.teacher.digest,
        "store": m.digest,
        "method": "samples",
        "min_mass": self.options.min_mass,
      },
    )

  def measure(self) -> JsonObject:
    """Converts a sample of each store, and writes nothing.

    Returns:
      By the folder of each store: sampled_share, the share of its rows; the statistics of these
      rows (`summary.table`); and estimates for the whole store: estimate.tokens, estimate.bytes,
      and estimate.seconds with this machine's processes, if nothing else runs on it.
    """
    overlap, out = self.conversion.tables.overlap(), {}
    with Progress("retarget", None, "tokens") as progress:
      for name, store in self.stores.items():
        measured = sample.measure(self.conversion, store, self.target(name))
        s, whole = measured.statistics, len(store) / measured.statistics.rows
        workers = min(self.workers, len(store.manifest.ranges))
        progress.add(s.teacher_tokens)
        out[name] = {
          "sampled_share": 1 / whole,
          **summary.table(s, overlap),
          "estimate.tokens": round(s.tokens * whole),
          "estimate.bytes": round(measured.bytes * whole),
          "estimate.seconds": round(measured.seconds * whole / workers, 1),
        }
    return out

  def convert(self, folder: Path) -> JsonObject:
    """Converts the missing shards of the stores into `folder`, those of retarget.slice.

    Returns:
      By the folder of each store: sequences, tokens, entries, bytes, retargeted_now, and the
      statistics (`summary.table`). With a slice only retargeted_now, the number of sequences that
      this call converted.

    Raises:
      InputError: A record of the source is damaged, or the folder holds other records.
      Preempted: SIGTERM was received; finished shards are kept.
    """
    index, count = slices.parse("retarget.slice", self.options.slice)
    with contextlib.ExitStack() as stack:
      writers = {}
      for name in self.stores:
        writer = Writer(folder / name, self.target(name), index, count)
        writers[name] = stack.enter_context(writer)
      missing = {name: writer.missing() for name, writer in writers.items()}
      self._convert(writers, [(name, rows) for name in missing for rows in missing[name]])
      now = {name: sum(map(len, missing[name])) for name in missing}
      if self.options.slice:
        return {name: {"retargeted_now": rows} for name, rows in now.items()}
      done = {name: self._complete(writer) for name, writer in writers.items()}
      return {name: {**sums, "retargeted_now": now[name]} for name, sums in done.items()}

  def _convert(self, writers: Mapping[str, Writer], shards: list[tuple[str, range]]) -> None:
    """Converts shards in the processes of a pool."""
    work = Work(self.conversion, self.stores, {n: w.shard_writer() for n, w in writers.items()})
    length_of = {name: store.manifest.seq_len for name, store in self.stores.items()}
    total = sum(len(rows) * length_of[name] for name, rows in shards)
    if not shards:
      return
    with (
      Progress("retarget", total, "tokens") as progress,
      distributed.Preemption() as stop,
      Pool(
        min(self.workers, len(shards)),
        work,
        stop.reached,
        distributed.Preemption.stop("retarget", "finished shards are kept"),
        "retarget",
      ) as pool,
    ):
      for (name, rows), _ in pool.map(convert.convert, shards):
        progress.add(len(rows) * length_of[name])

  def _complete(self, writer: Writer) -> JsonObject:
    """Writes retarget.json and the manifest of a store whose shards are finished."""
    tables, shards = self.conversion.tables, len(writer.manifest.ranges)
    statistics = summary.merge(writer.folder, shards, tables)
    if (done := writer.complete()) is None:
      raise InputError(f"{writer.folder} lacks shards that were finished before. Run again.")
    sums = {key: sum(getattr(s, key) for s in done.shards) for key in ("entries", "bytes")}
    return {"sequences": done.total, **sums, **summary.table(statistics, tables.overlap())}
