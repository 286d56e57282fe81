"""Records in the teacher's tokens as records in the student's tokens, with their targets.

A record depends on nothing but the record with its index and the seed, so results are the same in
any order, batch size and number of processes. Memory is that of the records of a call: about 2 KB
per teacher token for N = 63. Calls with 4 to 64 rows of 2,048 tokens are fastest, because their
arrays stay in the processor's cache.

The fields of a projected position:

  ids          counts of n points: the projection's own where it consists of whole counts, otherwise
               drawn from it, which leaves them unbiased. Below min_mass: n times the label.
  label_logp   from the exact probabilities of the teacher's tokens in the text, and counts of other
               tokens that make the label. Exact if no other token does.
  argmax       phi of the teacher's argmax, unless another token has more mass by more than a
               point. Inside of teacher tokens: the token with the most mass.
  entropy      an estimate: the teacher's exact entropy plus what the projection changes in the
               entropy of the counts; inside of teacher tokens that of the counts, which is too low.
               0 below min_mass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from distill_jax.cross_tokenizer.align import KINDS
from distill_jax.cross_tokenizer.project import POINT, Projected, TeacherRows, project
from distill_jax.cross_tokenizer.resample import resample
from distill_jax.cross_tokenizer.rows import AlignedRows, align_rows
from distill_jax.cross_tokenizer.statistics import Statistics
from distill_jax.cross_tokenizer.tables import PairTables
from distill_jax.records.fields import ARGMAX, ENTROPY, IDS, LABEL_LOGP, WEIGHT, Field, Record


def project_rows(
  tables: PairTables,
  rows: Sequence[Record],
  length: int,
  *,
  n: int,
  first: int,
  seed: int,
  min_mass: float,
) -> tuple[list[Record], Statistics]:
  """Returns records of kind "sampled" in the student's tokens.

  Args:
    tables: The tables of both tokenizers.
    rows: Consecutive records of a store of kind "sampled", from Store.read_many.
    length: Number of positions of a student row.
    n: Number of sampled points per position, of the store and of the result.
    first: The index of the first row in the store.
    seed: The seed of the sampling offsets.
    min_mass: See RetargetOptions.

  Returns:
    Records to be written, and their statistics. They have entropies if the source has.
  """
  aligned = align_rows(tables, rows, length)
  teacher = teacher_rows(aligned, rows, n)
  projected = project(tables, aligned.aligned, teacher, aligned.token_X, min_mass)
  u_X = _offsets(seed, first, len(rows), length)[aligned.row_X, aligned.position_X]
  count_E = resample(projected.start_X, projected.weight_E, n, u_X)
  values = {
    IDS: np.repeat(projected.id_E, count_E).reshape(-1, n),
    ARGMAX: _argmax(tables, aligned, rows, projected),
    LABEL_LOGP: projected.label_logp_X,
  }
  if ENTROPY.read in rows[0]:
    values[ENTROPY] = _entropy(aligned, rows, teacher, projected)
  _write(aligned, values)
  return aligned.records, _statistics(aligned, rows, projected)


def teacher_rows(aligned: AlignedRows, rows: Sequence[Record], n: int) -> TeacherRows:
  """Returns the distributions of records that were read, by teacher token."""
  weight_RTK = np.stack([row[WEIGHT.read] for row in rows])
  used_RTK = weight_RTK > 0
  ends = np.append(0, np.cumsum(used_RTK.sum(-1)))  # by position of all rows
  at = np.flatnonzero(used_RTK)
  place_G = aligned.row_G * weight_RTK.shape[1] + aligned.position_G - 1
  place_G = np.where(aligned.known_G, place_G, -1)
  return TeacherRows(
    n=n,
    id_E=np.concatenate([row[IDS.read] for row in rows]).reshape(-1)[at],
    count_E=np.rint(weight_RTK.reshape(-1)[at] * n).astype(np.int32),
    start_G=ends[place_G],
    end_G=np.where(aligned.known_G, ends[place_G + 1], ends[-1]),
    logp_G=np.concatenate([row[LABEL_LOGP.read] for row in rows]).astype(np.float64)[place_G],
  )


def _offsets(seed: int, first: int, rows: int, length: int) -> np.ndarray:
  """Returns the sampling offset in [0, 1) of each position of some rows, float64 [rows, length]."""
  draws = (np.random.Philox(key=seed, counter=[0, 0, 0, first + i]) for i in range(rows))
  return np.stack([np.random.Generator(d).random(length) for d in draws])


def _of_teacher(field: Field, aligned: AlignedRows, rows: Sequence[Record]) -> np.ndarray:
  """Returns the teacher's values at the positions of the distributions, [X]."""
  values_RT = np.stack([row[field.read] for row in rows])
  return values_RT[aligned.teacher_row_X, aligned.teacher_position_X]


def _argmax(
  tables: PairTables, aligned: AlignedRows, rows: Sequence[Record], projected: Projected
) -> np.ndarray:
  """Returns the most probable student token of each position, int64 [X]."""
  start_X, weight_E = projected.start_X, projected.weight_E
  owner_E = np.repeat(np.arange(len(start_X) - 1), np.diff(start_X))
  if not len(owner_E):
    return np.zeros(0, np.int64)
  most_X = np.maximum.reduceat(weight_E, start_X[:-1])
  at = np.flatnonzero(weight_E == most_X[owner_E])[::-1]
  best_X = np.zeros(len(most_X), np.int64)
  best_X[owner_E[at]] = projected.id_E[at]  # the first of equals

  top_X = _of_teacher(ARGMAX, aligned, rows).astype(np.int64)
  g_X, h_X = aligned.aligned.g_H[aligned.token_X], aligned.token_X
  is_label_X = top_X == aligned.aligned.token_G[g_X]
  label_X = np.where(projected.opened_X > 0, -1, aligned.aligned.id_H[h_X])
  phi_X = tables.phi_P[tables.offset_V[top_X]].astype(np.int64)
  given_X = np.where(is_label_X, label_X, phi_X)
  given_X[(aligned.offset_X > 0) | projected.hard_X] = -1
  is_given_E = projected.id_E == given_X[owner_E]
  given_weight_X = np.zeros(len(most_X), np.int64)
  given_weight_X[owner_E[is_given_E]] = weight_E[is_given_E]
  return np.where((given_X >= 0) & (most_X - given_weight_X <= POINT), given_X, best_X)


def _entropy(
  aligned: AlignedRows, rows: Sequence[Record], teacher: TeacherRows, projected: Projected
) -> np.ndarray:
  """Returns estimates of the entropies of the projected distributions, float64 [X]."""
  size_X = np.diff(projected.start_X)
  total_X = np.bincount(np.repeat(np.arange(len(size_X)), size_X), projected.weight_E, len(size_X))
  plug_in_X = _plug_in(projected.weight_E, size_X, total_X)
  size_G = teacher.end_G - teacher.start_G
  g_X = aligned.aligned.g_H[aligned.token_X]
  owner, _, count = teacher.entries(g_X)
  del owner
  source_X = _plug_in(count, size_G[g_X], np.full(len(g_X), float(teacher.n)))
  exact_X = _of_teacher(ENTROPY, aligned, rows).astype(np.float64)
  at_boundary = np.maximum(exact_X + (plug_in_X - source_X), 0)
  return np.where((aligned.offset_X > 0) | projected.hard_X, plug_in_X, at_boundary)


def _plug_in(weight_E: np.ndarray, size_X: np.ndarray, total_X: np.ndarray) -> np.ndarray:
  """Returns the entropies of distributions that are given by weights, float64 [X]."""
  owner_E = np.repeat(np.arange(len(size_X)), size_X)
  p_E = weight_E / total_X[owner_E]
  return np.bincount(owner_E, -p_E * np.log(p_E), len(size_X))


def _write(aligned: AlignedRows, values: dict[Field, np.ndarray]) -> None:
  """Writes the targets into the records of student rows."""
  length = len(aligned.records[0]["mask_T"])
  for i, record in enumerate(aligned.records):
    x = slice(*np.searchsorted(aligned.row_X, [i, i + 1]))
    at = aligned.position_X[x]
    for field, values_X in values.items():
      out = np.zeros((length, *values_X.shape[1:]), field.dtype)
      out[at] = values_X[x]
      record[field.record] = out


def _statistics(aligned: AlignedRows, rows: Sequence[Record], projected: Projected) -> Statistics:
  kinds = np.bincount(aligned.kind_X, minlength=len(KINDS)).tolist()
  kept = sum(int((r["segments_T"] > 0).sum()) for r in aligned.records)
  return Statistics(
    rows=len(rows),
    teacher_tokens=sum(int((row["segments_T"] > 0).sum()) for row in rows),
    teacher_targets=sum(int(row["mask_T"].sum()) for row in rows),
    tokens=kept,
    targets=len(aligned.token_X),
    positions=sum(len(r["mask_T"]) for r in aligned.records),
    cut_tokens=sum(aligned.lengths) - kept,
    cut_targets=aligned.cut_targets,
    kinds=Counter(dict(zip(KINDS, kinds, strict=True))),
    skipped=aligned.skipped,
    hard_targets=int(projected.hard_X.sum()),
    lost_mass=float(projected.lost_X.sum()),
    unresolved_mass=float(projected.unresolved_X.sum()),
    opened_mass=float(projected.opened_X.sum()),
    beyond_mass=float(projected.beyond_X.sum()),
  )
