"""Conversion of shards of records to the student's tokens. It runs in worker processes.

Shard k of the source becomes shard k of the result. Rows are read, converted and written in batches
of about 8,192 tokens, so a process holds the tables (`PairTables`) and one batch, whatever
the size of a shard. A record depends on the record with its index and on the seed alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from distill_jax.cross_tokenizer import summary
from distill_jax.cross_tokenizer.rows import align_rows
from distill_jax.cross_tokenizer.statistics import Statistics
from distill_jax.cross_tokenizer.student_lengths import batches
from distill_jax.cross_tokenizer.tables import PairTables
from distill_jax.records.fields import Record
from distill_jax.records.projected_rows import project_rows
from distill_jax.records.shard_writer import ShardWriter
from distill_jax.records.store import Store


@dataclasses.dataclass(frozen=True)
class Conversion:
  """The conversion of rows, the same for all stores of a run.

  Attributes:
    tables: The tables of both tokenizers.
    seed: The seed of the sampling offsets.
    min_mass: See RetargetOptions.
  """

  tables: PairTables
  seed: int
  min_mass: float

  def rows(self, store: Store, rows: range, length: int) -> tuple[Sequence[Record], Statistics]:
    """Returns consecutive rows of a store in the student's tokens, and their statistics.

    Args:
      store: The store in the teacher's tokens.
      rows: The indices of the rows.
      length: Number of positions of a row of the result.
    """
    read = store.read_many(rows)
    if store.manifest.kind == "text":
      aligned = align_rows(self.tables, read, length)
      return aligned.records, aligned.statistics(read)
    return project_rows(
      self.tables,
      read,
      length,
      n=store.manifest.n,
      first=rows.start,
      seed=self.seed,
      min_mass=self.min_mass,
    )


@dataclasses.dataclass(frozen=True)
class Work:
  """The work of a run, for its worker processes.

  Attributes:
    conversion: How rows are converted.
    stores: The stores in the teacher's tokens, by their folders.
    writers: What writes each of them in the student's tokens.
  """

  conversion: Conversion
  stores: Mapping[str, Store]
  writers: Mapping[str, ShardWriter]


def convert(work: Work, name: str, rows: range) -> None:
  """Writes a shard in the student's tokens, and its statistics.

  The statistics are written before the shard is registered, so a registered shard has them.

  Args:
    work: The stores.
    name: The folder of a store.
    rows: The sequences of a shard.

  Raises:
    InputError: A record of the source is damaged, or the shard cannot be written.
  """
  store, writer = work.stores[name], work.writers[name]

  def converted() -> Iterator[Record]:
    total = Statistics()
    for part in batches(rows, store.manifest.seq_len):
      records, statistics = work.conversion.rows(store, part, writer.manifest.seq_len)
      total += statistics
      yield from records
    summary.write_shard(writer.folder, writer.manifest.ranges.index(rows), total)

  writer.write(rows, converted())
