"""Rows of text in a teacher's tokens, read as the rows of a student with another tokenizer.

Row i has the text of row i of the teacher. For texts that the student wrote it is the other way
round: the rows are given in the student's tokens, and the teacher's are made. A row is aligned when
it is read, in about the time that tokenizing it takes, and nothing is kept: `record` reads the next
batch while the devices compute, and training in the threads of its loader.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from distill_jax.cross_tokenizer.align import KINDS, REASONS
from distill_jax.cross_tokenizer.chains import DEPTH, Splits, chains
from distill_jax.cross_tokenizer.dense import DenseTables, Links
from distill_jax.cross_tokenizer.dense_targets import TeacherText
from distill_jax.cross_tokenizer.rows import AlignedRows, align_rows
from distill_jax.cross_tokenizer.statistics import Statistics
from distill_jax.cross_tokenizer.student_lengths import Source
from distill_jax.cross_tokenizer.student_texts import StudentTexts
from distill_jax.cross_tokenizer.tables import PairTables
from distill_jax.data import model_rows
from distill_jax.nn import sharding
from distill_jax.records import projected_sampler
from distill_jax.records.fields import TEXT, Record
from distill_jax.types import Batch, Inputs

TEACHER = "teacher"
PREFIX = "teacher_"  # of the fields of the teacher's row in a record
LINKS = "links_TLF"  # the chains of a record; F are the fields of dense.Links
COUNTS = "counts"  # numbers of a row, in the order of NUMBERS, align.KINDS and align.REASONS
NUMBERS = (
  *("rows", "teacher_tokens", "teacher_targets", "tokens", "targets", "positions"),
  *("cut_tokens", "cut_targets", "cut_chains"),
)


class StudentRows(Sequence):
  """The student's rows of a text, and the teacher's.

  A record has the fields of the student's text, those of the teacher's with PREFIX, LINKS, and
  COUNTS.

  Args:
    rows: The teacher's rows; with `texts` the student's.
    tables: The tables of both tokenizers.
    splits: Their splits.
    positions: Number of positions of a student row. Tokens that do not fit are cut.
    teacher_positions: Number of positions of a teacher row.
    texts: What aligns texts that the student wrote; None for the teacher's rows.

  Attributes:
    rows: See Args.
    tables: See Args.
    splits: See Args.
    positions: See Args.
    teacher_positions: See Args.
    texts: See Args.
  """

  def __init__(
    self,
    rows: Source,
    tables: PairTables,
    splits: Splits,
    positions: int,
    teacher_positions: int,
    texts: StudentTexts | None = None,
  ):
    self.rows, self.tables, self.splits = rows, tables, splits
    self.positions, self.teacher_positions, self.texts = positions, teacher_positions, texts

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: Any) -> Any:
    indices = range(len(self))[index]
    return self.read_many(indices) if isinstance(index, slice) else self.read_many([indices])[0]

  def read_many(self, indices: Sequence[int]) -> list[Record]:
    """Returns some rows, in the order of their indices."""
    return [self._aligned(row) for row in self.rows.read_many(indices)]

  @property
  def dense_tables(self) -> DenseTables:
    """The tables as numpy arrays."""
    return DenseTables.of(self.tables, self.splits)

  def on_devices(self, mesh: Mesh) -> DenseTables:
    """Returns the tables on every device of a mesh."""
    replicated = sharding.replicated(mesh)

    def put(x: np.ndarray) -> jax.Array:
      return jax.make_array_from_callback(x.shape, replicated, lambda index: x[index])

    return jax.tree.map(put, self.dense_tables)

  def _both(self, row: Record) -> tuple[AlignedRows, Record]:
    """Returns a row in the student's tokens, and in the teacher's."""
    if self.texts is not None:
      return self.texts.align(row)
    return align_rows(self.tables, [row], self.positions), row

  def _aligned(self, row: Record) -> Record:
    aligned, theirs = self._both(row)
    at = aligned.token_X
    of = chains(self.tables, self.splits, aligned.aligned, at, aligned.known_G)
    place = np.where(of.place < 0, 0, aligned.position_G[of.place])
    fields_XLF = np.stack([place, of.real, of.split, of.base, of.low, of.high], -1)
    links_TLF = np.zeros((self.positions, *fields_XLF.shape[1:]), np.int32)
    links_TLF[aligned.position_X] = fields_XLF
    teacher = {PREFIX + name: theirs[name] for name in TEXT}
    counts = dataclasses.replace(aligned.statistics([theirs]), cut_chains=int(of.cut.sum()))
    numbers = [getattr(counts, name) for name in NUMBERS]
    numbers += [counts.kinds[kind] for kind in KINDS]
    numbers += [counts.skipped[reason] for reason in REASONS]
    return aligned.records[0] | teacher | {LINKS: links_TLF, COUNTS: np.array(numbers)}


def placeholder(positions: int, teacher_positions: int) -> Record:
  """Returns a record of StudentRows whose values have no meaning, for the shapes of a batch."""

  def text(prefix: str, length: int) -> Record:
    return {prefix + name: np.ones(length, bool if name == "mask_T" else np.int32) for name in TEXT}

  links = {LINKS: np.zeros((positions, DEPTH, len(dataclasses.fields(Links))), np.int32)}
  counts = {COUNTS: np.zeros(len(NUMBERS) + len(KINDS) + len(REASONS), np.int64)}
  return text("", positions) | text(PREFIX, teacher_positions) | links | counts


def statistics(rows: Sequence[Record], targets: Mapping[str, np.ndarray]) -> Statistics:
  """Returns the statistics of some rows.

  Args:
    rows: Rows of StudentRows.
    targets: What `projected_sampler.summarise` returned for them.
  """
  sums = np.sum([row[COUNTS] for row in rows], 0).tolist()
  first, second = len(NUMBERS), len(NUMBERS) + len(KINDS)
  mask_BT = np.stack([row["mask_T"] for row in rows])
  masses = {name: _sum(targets[key][mask_BT]) for key, name in projected_sampler.STATISTICS.items()}
  given: dict[str, Any] = masses | dict(zip(NUMBERS, sums[:first], strict=True))
  given["hard_targets"] = int(masses["hard_targets"])
  return Statistics(
    kinds=Counter(dict(zip(KINDS, sums[first:second], strict=True))),
    skipped=+Counter(dict(zip(REASONS, sums[second:], strict=True))),
    **given,
  )


def _sum(values_X: np.ndarray) -> float:
  """Returns the sum of values in steps of 2^-24, which does not depend on how rows are grouped.

  Sums of such numbers up to 2^29 are exact in float64.
  """
  return float(np.rint(np.float64(values_X) * 2**24).sum() / 2**24)


def read(stack: Callable[[str], np.ndarray]) -> Batch:
  """Returns the student's rows as a batch, with the teacher's text as the targets of TEACHER."""
  ours, theirs = (
    Inputs.of(stack(f"{prefix}tokens_T"), stack(f"{prefix}segments_T")) for prefix in ("", PREFIX)
  )
  labels_BT: Any = model_rows.next_tokens(np.asarray(ours.tokens_BT))
  mask_BT: Any = stack("mask_T")
  links_BTLF: Any = stack(LINKS)
  text = TeacherText(inputs=theirs, links_BTLF=links_BTLF)
  return Batch(ours, labels_BT, mask_BT, {TEACHER: text})
