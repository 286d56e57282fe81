"""Documents of tokens to rows of one length, and rows to what a model reads.

Documents are laid end to end and cut at the row's end. Each document, or piece of one,
is a segment of its row; attention and positions never cross segments (types.Inputs).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Ids

import numpy as np

from distill_jax.errors import InputError

Document = Ids[int] | np.ndarray | tuple[Ids[int], Ids[bool]] | tuple[Ids[int], Ids[bool], float]


@dataclasses.dataclass(frozen=True, eq=False)
class Sequence:
  """One row of T packed tokens.

  Attributes:
    tokens_T: int32; 0 in padding.
    segments_T: int32, numbered from 1 in the row's own order; 0 is padding.
    mask_T: bool, the tokens that the documents want learnt. What is really learnt is
      `to_inputs`' to say: the first token of a segment has nothing to predict it.
    smoothing_T: float32, of the labels of each document.
  """

  tokens_T: np.ndarray
  segments_T: np.ndarray
  mask_T: np.ndarray
  smoothing_T: np.ndarray

  def record(self) -> dict[str, np.ndarray]:
    """A record without targets, whose mask says where there is a label to learn."""
    learnt_T = to_inputs(self.tokens_T, self.segments_T, self.mask_T)[-1]
    return {"tokens_T": self.tokens_T, "segments_T": self.segments_T, "mask_T": learnt_T}


def pack(
  documents: Iterable[Document], seq_len: int, eos_id: int | None, whole: bool = False
) -> Iterator[Sequence]:
  """Packs documents into rows of `seq_len` tokens, in order, losing and doubling none.

  Args:
    documents: token ids (all are learnt), or a tuple (ids, mask[, label smoothing]) of one
      length. An empty document is passed over.
    seq_len: tokens a row, at least 2.
    eos_id: appended to every document, and learnt where the document's last token is;
      None appends nothing.
    whole: a document that does not fit into what is left of a row begins the next one, so
      only those longer than a row are cut.

  Yields:
    Rows; the last is padded. One row is held at a time.

  Raises:
    InputError: a document that is not token ids, or no tokens at all.
  """
  if seq_len < 2:
    raise InputError(f"seq_len is {seq_len}; a row needs at least 2 tokens for one label")
  if eos_id is not None and not 0 <= eos_id < 2**31:
    raise InputError(f"eos_id is {eos_id}; give a token id, or None to append nothing")
  return _rows(documents, seq_len, eos_id, whole)


def _rows(
  documents: Iterable[Document], seq_len: int, eos_id: int | None, whole: bool
) -> Iterator[Sequence]:
  row, filled, segment, n_rows = _empty(seq_len), 0, 0, 0
  for number, document in enumerate(documents):
    ids, mask = _arrays(document, number, eos_id)
    smoothing = document[2] if isinstance(document, tuple) and len(document) == 3 else 0.0
    if whole and 0 < seq_len - filled < len(ids) and filled:
      yield row
      row, filled, segment, n_rows = _empty(seq_len), 0, 0, n_rows + 1
    while len(ids):
      take = min(seq_len - filled, len(ids))
      part, segment = slice(filled, filled + take), segment + 1
      row.tokens_T[part], row.segments_T[part], row.mask_T[part] = ids[:take], segment, mask[:take]
      row.smoothing_T[part] = smoothing
      ids, mask, filled = ids[take:], mask[take:], filled + take
      if filled == seq_len:
        yield row
        row, filled, segment, n_rows = _empty(seq_len), 0, 0, n_rows + 1
  if filled:
    yield row
  elif not n_rows:
    raise InputError("the documents hold no tokens at all, so there is nothing to pack")


def to_inputs(
  tokens: np.ndarray, segments: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Rows as they are packed to what a model reads and is scored on.

  The label of a position is the next token of its own segment. This is the one place
  that says so: at the end of a segment, of the row, and in padding, nothing is learnt.

  Args:
    tokens, segments, mask: [..., T], as in `Sequence`.

  Returns:
    (tokens int32, positions int32, segments int32, labels int32, mask bool), each
    [..., T]. Positions start at 0 in each segment (and in the padding); the label of the
    last position is 0, with mask False.
  """
  if not tokens.shape == segments.shape == mask.shape or tokens.ndim < 1:
    raise InputError(
      f"tokens {tokens.shape}, segments {segments.shape} and mask {mask.shape} are rows of one "
      "shape; give all three as [..., T]"
    )
  t_T = np.arange(tokens.shape[-1], dtype=np.int32)
  same = segments[..., 1:] == segments[..., :-1]  # is this token in the segment before it?
  first = np.insert(~same, 0, True, axis=-1)
  positions = t_T - np.maximum.accumulate(np.where(first, t_T, 0), axis=-1)
  labels = np.zeros_like(tokens, dtype=np.int32)
  labels[..., :-1] = tokens[..., 1:]
  learnt = np.zeros(tokens.shape, bool)
  learnt[..., :-1] = mask[..., 1:] & same & (segments[..., :-1] != 0)
  return (
    tokens.astype(np.int32),
    positions.astype(np.int32),
    segments.astype(np.int32),
    labels,
    learnt,
  )


def _empty(seq_len: int) -> Sequence:
  return Sequence(*(np.zeros(seq_len, kind) for kind in (np.int32, np.int32, bool, np.float32)))


def _arrays(document: Document, number: int, eos_id: int | None) -> tuple[np.ndarray, np.ndarray]:
  """(ids int32, mask bool) of a document, eos included."""
  ids, mask = document[:2] if isinstance(document, tuple) else (document, None)
  ids = np.asarray(ids)
  if not ids.size:
    return np.zeros(0, np.int32), np.zeros(0, bool)
  if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= 2**31:
    raise InputError(
      f"document {number} is {ids.dtype} {ids.shape} from {ids.min()} to {ids.max()}; token ids "
      "are one row of integers from 0 to 2**31 - 1"
    )
  mask = np.ones(len(ids), bool) if mask is None else np.asarray(mask, bool)
  if mask.shape != ids.shape:
    raise InputError(
      f"document {number} has {len(ids)} tokens and a mask of shape {mask.shape}; give one each"
    )
  if eos_id is not None:
    ids, mask = np.append(ids, eos_id), np.append(mask, mask[-1])
  return ids.astype(np.int32), mask
