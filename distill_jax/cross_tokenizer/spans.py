"""Spans of the text that begin and end with a token in both tokenizations, for the loss `alm`.

The teacher's log-probability of a span is the sum of those of its tokens, which records hold
exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # training needs the names of the fields, and no tokenizer
  from distill_jax.cross_tokenizer.rows import AlignedRows

LOGP, LEFT = "span_logp_T", "span_left_T"  # fields of a record; see losses.SpanTargets


def add_spans(rows: AlignedRows, label_logp: Sequence[np.ndarray]) -> None:
  """Adds span_logp_T and span_left_T to the records of some rows.

  A span is skipped if the teacher did not predict all of its tokens, or the student does not
  predict all of them: the first span of a segment, spans of which a part is masked or cut, and what
  follows the last common border of a segment.

  Args:
    rows: The aligned rows.
    label_logp: The teacher's log-probability of the label of each position, float [T], of each row.
  """
  aligned, H = rows.aligned, len(rows.aligned.id_H)
  # A span has the number of the common border at its end. Tokens after the last border of a segment
  # have the number of the next segment's first span, which is skipped in any case.
  ends = np.intersect1d(aligned.end_G, aligned.end_H)
  span_G, span_H = np.searchsorted(ends, aligned.end_G), np.searchsorted(ends, aligned.end_H)
  count = len(ends) + 1
  is_label_H = np.zeros(H, bool)
  is_label_H[rows.token_X] = True
  whole = (np.bincount(span_G, ~rows.known_G, count) == 0) & (
    np.bincount(span_H, ~is_label_H, count) == 0
  )
  whole[-1] = False
  first, last = np.zeros(count, np.int64), np.zeros(count, np.int64)  # of each span, among H
  last[span_H] = np.arange(H)
  first[span_H[::-1]] = np.arange(H)[::-1]
  # The tokens that a chat template prompts the student with have the first place of their segment,
  # even if they reach into a content. A span from which such a token has taken bytes is skipped.
  whole &= np.bincount(span_H, minlength=count) == last - first + 1
  some = np.flatnonzero(whole)
  border = np.append(-1, ends)[some]  # where each begins
  whole[some] = (aligned.start_H[first[some]] == border) | (
    aligned.end_H[first[some] - 1] == border
  )
  at = np.stack([np.append(0.0, logp[:-1]) for logp in label_logp])[rows.row_G, rows.position_G]
  logp = np.bincount(span_G, np.where(rows.known_G, at, 0.0), count)
  for record in rows.records:
    record[LOGP] = np.zeros(len(record["mask_T"]), np.float32)
    record[LEFT] = np.zeros(len(record["mask_T"]), np.int32)
  span_X = span_H[rows.token_X]
  left_X = last[span_X] + 1 - rows.token_X
  for i, record in enumerate(rows.records):
    of_row = (rows.row_X == i) & whole[span_X]
    record[LOGP][rows.position_X[of_row]] = logp[span_X[of_row]]
    record[LEFT][rows.position_X[of_row]] = left_X[of_row]
