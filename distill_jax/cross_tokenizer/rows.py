"""Rows of a store in the teacher's tokens as rows in the student's tokens.

Row i of the result has the text of row i of the source.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from distill_jax.cross_tokenizer import align as align_lib
from distill_jax.cross_tokenizer.align import Aligned
from distill_jax.cross_tokenizer.statistics import Statistics
from distill_jax.cross_tokenizer.tables import PairTables

Record = dict[str, np.ndarray]  # see records/fields.py


@dataclasses.dataclass(frozen=True)
class AlignedRows:
  """Student rows without targets, and the places of the teacher's distributions.

  Attributes:
    records: tokens_T, segments_T and mask_T of each student row. mask_T is True at positions whose
      label has a distribution.
    aligned: The tokens of all segments of all rows.
    row_G: int64, the row of each teacher token.
    position_G: int64, its position in the row. The targets at the position before predict it.
    known_G: bool, True where the source has targets that predict it.
    token_X: int64, the indices among H of the student tokens that are labels with a distribution.
    row_X: int64, the row of each of them.
    position_X: int64, the position whose label it is, i.e. that of the token minus 1.
    lengths: Number of student tokens of each row, before those that do not fit are cut.
    cut_targets: Number of labels with a distribution that do not fit.
    skipped: Number of segments without student tokens, by reason (align.REASONS).
  """

  records: list[Record]
  aligned: Aligned
  row_G: np.ndarray
  position_G: np.ndarray
  known_G: np.ndarray
  token_X: np.ndarray
  row_X: np.ndarray
  position_X: np.ndarray
  lengths: list[int]
  cut_targets: int
  skipped: Counter[str]

  @property
  def teacher_row_X(self) -> np.ndarray:
    """The source row of the distribution of each label, int64."""
    return self.row_G[self.aligned.g_H[self.token_X]]

  @property
  def teacher_position_X(self) -> np.ndarray:
    """The position of that row with the distribution, int64."""
    return self.position_G[self.aligned.g_H[self.token_X]] - 1

  @property
  def offset_X(self) -> np.ndarray:
    """The number of bytes by which each label begins inside of the teacher's token, int64."""
    return self.aligned.offset_H[self.token_X]

  @property
  def kind_X(self) -> np.ndarray:
    """The kind of each label as an index of align.KINDS, int8."""
    return self.aligned.kind_of(self.token_X)

  def statistics(self, rows: Sequence[Record]) -> Statistics:
    """Returns the numbers of tokens and targets.

    Args:
      rows: The rows in the teacher's tokens.
    """
    kinds = np.bincount(self.kind_X, minlength=len(align_lib.KINDS)).tolist()
    kept = sum(int((r["segments_T"] > 0).sum()) for r in self.records)
    return Statistics(
      rows=len(rows),
      teacher_tokens=sum(int((row["segments_T"] > 0).sum()) for row in rows),
      teacher_targets=sum(int(row["mask_T"].sum()) for row in rows),
      tokens=kept,
      targets=len(self.token_X),
      positions=sum(len(r["mask_T"]) for r in self.records),
      cut_tokens=sum(self.lengths) - kept,
      cut_targets=self.cut_targets,
      kinds=Counter(dict(zip(align_lib.KINDS, kinds, strict=True))),
      skipped=self.skipped,
    )


def align_rows(tables: PairTables, rows: Sequence[Record], length: int) -> AlignedRows:
  """Aligns the student's tokens of the texts of some rows.

  Args:
    tables: The tables of both tokenizers.
    rows: tokens_T, segments_T and mask_T of rows in the teacher's tokens. The targets at a position
      predict the next token, and mask_T tells where there are targets.
    length: Number of positions of a student row. Tokens that do not fit are cut.
  """
  places = [_segments(row["segments_T"]) for row in rows]
  tokens = [row["tokens_T"][a:b] for row, spans in zip(rows, places, strict=True) for a, b in spans]
  # The first segment of a row may be the rest of a document that the row before it begins.
  begins = [i > 0 for spans in places for i in range(len(spans))]
  aligned, skipped = align_lib.align(tables, tokens, begins)
  row_S = np.repeat(np.arange(len(rows)), [len(spans) for spans in places])
  first_S = np.array([a for spans in places for a, _ in spans], np.int64)
  segment_G = aligned.segment_G
  row_G = row_S[segment_G]
  start = np.searchsorted(segment_G, segment_G)
  position_G = first_S[segment_G] + np.arange(len(segment_G)) - start
  known_G = _mask(rows)[row_G, position_G]

  row_H = row_S[aligned.segment_H]
  rank_H = np.arange(len(row_H)) - np.searchsorted(row_H, row_H)  # position in its row
  fits_H = rank_H < length
  taught = np.flatnonzero(_is_taught(tables, aligned, known_G))
  fits = fits_H[taught]
  token_X = taught[fits]
  out = AlignedRows(
    records=_empty_records(len(rows), length),
    aligned=aligned,
    row_G=row_G,
    position_G=position_G,
    known_G=known_G,
    token_X=token_X,
    row_X=row_H[token_X],
    position_X=rank_H[token_X] - 1,
    lengths=np.bincount(row_H, minlength=len(rows)).tolist(),
    cut_targets=int((~fits).sum()),
    skipped=skipped,
  )
  _fill(out.records, out, row_H, rank_H, fits_H)
  return out


def _segments(segments_T: np.ndarray) -> list[tuple[int, int]]:
  """Returns the first position of each segment of a row, and the one after its last."""
  cuts = np.flatnonzero(segments_T[1:] != segments_T[:-1]) + 1
  starts = np.append(0, cuts).tolist()
  ends = np.append(cuts, len(segments_T)).tolist()
  return [(a, b) for a, b in zip(starts, ends, strict=True) if segments_T[a]]


def _mask(rows: Sequence[Record]) -> np.ndarray:
  """Returns True at [i, t] where row i has targets that predict token t."""
  return np.stack([np.append(False, row["mask_T"][:-1]) for row in rows])


def _is_taught(tables: PairTables, aligned: Aligned, known_G: np.ndarray) -> np.ndarray:
  """Returns True for student tokens that follow one of their segment and have a distribution."""
  segment_H = aligned.segment_H
  if not len(segment_H):
    return np.zeros(0, bool)
  is_first = np.append(True, segment_H[1:] != segment_H[:-1])
  token = aligned.token_G[aligned.g_H]
  # A dummy space after a control token shares its place, but is not its student token.
  is_role = aligned.id_H == tables.phi_P[tables.offset_V[token]]
  return ~is_first & known_G[aligned.g_H] & (~tables.control_V[token] | is_role)


def _empty_records(rows: int, length: int) -> list[Record]:
  return [
    {
      "tokens_T": np.zeros(length, np.int32),
      "segments_T": np.zeros(length, np.int32),
      "mask_T": np.zeros(length, bool),
    }
    for _ in range(rows)
  ]


def _fill(
  records: list[Record],
  rows: AlignedRows,
  row_H: np.ndarray,
  rank_H: np.ndarray,
  fits_H: np.ndarray,
) -> None:
  """Writes the student's tokens, segments (numbered from 1) and mask into records."""
  for i, record in enumerate(records):
    h = slice(*np.searchsorted(row_H, [i, i + 1]))
    at, keep = rank_H[h][fits_H[h]], fits_H[h]
    segment = rows.aligned.segment_H[h]
    number = np.cumsum(np.append(True, segment[1:] != segment[:-1])) if len(segment) else segment
    record["tokens_T"][at] = rows.aligned.id_H[h][keep]
    record["segments_T"][at] = number[keep]
    x = slice(*np.searchsorted(rows.row_X, [i, i + 1]))
    record["mask_T"][rows.position_X[x]] = True
