"""Texts that a student wrote, aligned with the teacher's tokens of them.

The student's tokens are the sampled ones, even where its tokenizer would spell the text with other
tokens: a text is never tokenized again for the student. The teacher's tokens are those that its own
tokenizer makes of the text; a prompt in the form of the student's chat template gets the teacher's.

A generated token has a target if the teacher's tokens cover its bytes. The teacher reads a text up
to the first control token inside of it, or the first bytes that do not decode to text. The tokens
from there on have no targets.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from distill_jax.cross_tokenizer.align import CUT, Aligned, Segment, align_segment, join
from distill_jax.cross_tokenizer.chats import ChatAligner
from distill_jax.cross_tokenizer.rows import AlignedRows, Record
from distill_jax.cross_tokenizer.sides import Side
from distill_jax.cross_tokenizer.tables import PairTables


class StudentTexts:
  """Aligns texts in a student's tokens. It can be pickled.

  Args:
    tables: The tables of both tokenizers.
    teacher: The teacher's tokens.
    student: The student's.
    length: Number of positions of a row of the teacher. What does not fit has no targets.
  """

  def __init__(self, tables: PairTables, teacher: Side, student: Side, length: int):
    self._theirs, self._ours, self.length = tables.teacher, tables.student, length
    # The teacher's token of each of the student's control tokens that has one.
    self._roles = {ours: theirs for theirs, ours in tables.roles.items()}
    if self._ours.end is not None and self._theirs.end is not None:
      self._roles[self._ours.end] = self._theirs.end
    self._chats: ChatAligner | None = None
    if teacher.template is not None and student.template is not None:
      a, b = student.vocabulary, teacher.vocabulary
      self._chats = ChatAligner(a, b, student.template, teacher.template)

  def align(self, row: Record) -> tuple[AlignedRows, Record]:
    """Aligns a row that holds one text.

    Args:
      row: tokens_T, segments_T and mask_T in the student's tokens, and any other fields. mask_T is
        True where the next token was generated.

    Returns:
      The row, with mask_T where the next token also has a target, and the row of the teacher.
    """
    tokens_H = row["tokens_T"][row["segments_T"] > 0].astype(np.int64)
    wanted_H = np.append(False, row["mask_T"])[: len(tokens_H)]
    found = self._segment(tokens_H, wanted_H)
    segment = found if isinstance(found, Segment) else None
    aligned = join([segment])
    position_G = np.arange(len(aligned.token_G))
    known_G = (position_G > 0) & (position_G < self.length)
    taught_H = np.zeros(len(tokens_H), bool)
    if segment is not None:
      taught_H = wanted_H & _is_covered(aligned, known_G)
    token_X = np.flatnonzero(taught_H)
    mask_T = np.zeros_like(row["mask_T"])
    mask_T[token_X - 1] = True
    rows = AlignedRows(
      records=[row | {"mask_T": mask_T}],
      aligned=aligned,
      row_G=np.zeros_like(position_G),
      position_G=position_G,
      known_G=known_G,
      token_X=token_X,
      row_X=np.zeros_like(token_X),
      position_X=token_X - 1,
      lengths=[len(tokens_H)],
      cut_targets=int(wanted_H.sum()) - len(token_X),
      skipped=Counter([found] if isinstance(found, str) else []),
    )
    return rows, self._teacher_row(aligned.token_G)

  def _segment(self, tokens_H: np.ndarray, wanted_H: np.ndarray) -> Segment | str:
    """Returns the tokens of both, or the reason why the teacher has none."""
    kept = self._readable(tokens_H, int(np.argmax(wanted_H)) if wanted_H.any() else len(tokens_H))
    found = (self._chats or self._text)(tokens_H[:kept])
    if isinstance(found, str):
      return found
    if not len(found.id_H):
      return CUT
    # In `found`, the student's tokens are the given ones, G.
    start_G, end_G = _in_order(found.start_H, found.end_H)
    rest = np.arange(len(tokens_H) - kept) + (found.end_G[-1] if kept else 0)
    start_H, end_H = np.append(found.start_G, rest), np.append(found.end_G, rest + 1)
    return Segment(found.id_H, start_G, end_G, tokens_H, start_H, end_H)

  def _readable(self, tokens_H: np.ndarray, first: int) -> int:
    """Returns the number of tokens before one that the teacher cannot read.

    Args:
      tokens_H: The tokens of a text.
      first: The number of tokens of the prompt.
    """
    ours, n = self._ours, len(tokens_H)
    stop = next((h for h in range(first, n) if not ours.length_V[tokens_H[h]]), n)
    try:
      ours.spell(tokens_H[first:stop]).decode()
    except UnicodeDecodeError as e:
      _, ends = ours.places(tokens_H[first:stop])
      return first + int(np.searchsorted(ends, e.start, "right"))
    is_end = stop < n and tokens_H[stop] == ours.end
    return stop + (is_end and ours.end in self._roles)

  def _text(self, tokens_H: np.ndarray) -> Segment | str:
    """Aligns a text that begins as the tokenizers begin one; see Tokenizer.begin."""
    ours = self._ours.tokenizer.begin
    theirs = np.array(self._theirs.tokenizer.begin, np.int64)
    n = len(ours) if tokens_H[: len(ours)].tolist() == ours else 0
    # The student's tokens are given and the teacher's are made, so the two change places.
    found = align_segment(self._ours, self._theirs, self._roles, tokens_H[n:])
    if isinstance(found, str):
      return found
    # The teacher's beginning has no place, and each token of the student's has one.
    begin, places = np.zeros(len(theirs), np.int64), np.arange(n)
    return Segment(
      tokens_H,
      np.append(places, found.start_G + n),
      np.append(places + 1, found.end_G + n),
      np.append(theirs, found.id_H),
      np.append(begin, found.start_H + n),
      np.append(begin, found.end_H + n),
    )

  def _teacher_row(self, token_G: np.ndarray) -> Record:
    """Returns the teacher's row, whose tokens are one segment."""
    tokens, n = np.zeros(self.length, np.int32), min(len(token_G), self.length)
    tokens[:n] = token_G[:n]
    used = np.arange(self.length)
    mask_T = used < n - 1
    return {"tokens_T": tokens, "segments_T": (used < n).astype(np.int32), "mask_T": mask_T}


def _in_order(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns ascending places for tokens of which some have no bytes of the text.

  These, e.g. the tokens of the teacher's chat template, are placed at the end of those before them.
  """
  is_empty = end <= start
  if not is_empty.any():
    return start, end
  reach = np.maximum.accumulate(np.where(is_empty, start.min(initial=0), end))
  return np.where(is_empty, reach, start), np.where(is_empty, reach, end)


def _is_covered(aligned: Aligned, known_G: np.ndarray) -> np.ndarray:
  """Returns True for the student's tokens whose bytes all are in tokens that the teacher predicts.

  Bytes of an answer that share a token with the teacher's chat template are in none.
  """
  start_H, end_H, g_H = aligned.start_H, aligned.end_H, aligned.g_H
  start_G, end_G = aligned.start_G, aligned.end_G
  last_H = np.maximum(np.searchsorted(start_G, end_H - 1, "right") - 1, 0)
  inside = (start_H < end_G[g_H]) & (end_H <= end_G[last_H])
  return inside & known_G[g_H] & known_G[last_H]
