"""Packing: documents of tokens to rows of one length, and rows to the inputs and labels of a model.

Documents are laid end to end and cut at the row's end. Each document, or piece of one, is a
segment of its row; attention and positions never cross segments (types.Inputs).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from distill_jax.errors import InputError


class MaskedDocument(NamedTuple):
  """A document of which some tokens are trained on.

  Attributes:
    ids: its tokens.
    mask: for each, whether it is trained on.
    smoothing: label smoothing of all of them.
  """

  ids: Sequence[int]
  mask: Sequence[bool]
  smoothing: float = 0.0


Document = Sequence[int] | np.ndarray | MaskedDocument | tuple[Sequence[int], Sequence[bool]]


@dataclasses.dataclass(frozen=True, eq=False)
class PackedRow:
  """One row of T packed tokens.

  Attributes:
    tokens_T: int32; 0 in padding.
    segments_T: int32, numbered from 1 in the row's own order; 0 is padding.
    mask_T: bool, the tokens that the documents want trained on. `label_mask` says which of them
      can be: the first token of a segment has nothing to predict it.
    smoothing_T: float32, label smoothing, the same for all tokens of a document.
  """

  tokens_T: np.ndarray
  segments_T: np.ndarray
  mask_T: np.ndarray
  smoothing_T: np.ndarray

  def record(self) -> dict[str, np.ndarray]:
    """Returns a record without targets, whose mask is True at the positions with a label."""
    mask_T = label_mask(self.segments_T, self.mask_T)
    return {"tokens_T": self.tokens_T, "segments_T": self.segments_T, "mask_T": mask_T}


class ModelRows(NamedTuple):
  """Packed rows as a model reads them, and their labels; each array is [..., T].

  Attributes:
    tokens: int32.
    positions: int32, from 0 in each segment, and in the padding.
    segments: int32.
    labels: int32, the next token; of the last position 0.
    mask: bool, the positions whose label is trained on.
  """

  tokens: np.ndarray
  positions: np.ndarray
  segments: np.ndarray
  labels: np.ndarray
  mask: np.ndarray


def pack(
  documents: Iterable[Document], seq_len: int, eos_id: int | None, whole: bool = False
) -> Iterator[PackedRow]:
  """Packs documents into rows of `seq_len` tokens, in order, losing and doubling none.

  Args:
    documents: token ids, all of which are trained on, or masked documents. Empty ones are skipped.
    seq_len: tokens a row, at least 2.
    eos_id: appended to every document, and trained on where the document's last token is; None
      appends nothing.
    whole: a document that does not fit into what is left of a row begins the next one, so that
      only documents longer than a row are cut.

  Yields:
    Rows; the last is padded. One row is held at a time.

  Raises:
    InputError: a document is not token ids, or there are no tokens at all.
  """
  if seq_len < 2:
    raise InputError(f"seq_len is {seq_len}; a row needs at least 2 tokens for one label")
  if eos_id is not None and not 0 <= eos_id < 2**31:
    raise InputError(f"eos_id is {eos_id}; give a token id, or None to append nothing")
  return _rows(documents, seq_len, eos_id, whole)


def _rows(
  documents: Iterable[Document], seq_len: int, eos_id: int | None, whole: bool
) -> Iterator[PackedRow]:
  row, is_empty = _OpenRow(seq_len), True
  for number, document in enumerate(documents):
    ids, mask, smoothing = _arrays(document, number, eos_id)
    is_empty &= not len(ids)
    if whole and row.filled and row.room < len(ids):
      yield row.row
      row = _OpenRow(seq_len)
    taken = 0
    while taken < len(ids):
      taken += row.add(ids[taken:], mask[taken:], smoothing)
      if not row.room:
        yield row.row
        row = _OpenRow(seq_len)
  if row.filled:
    yield row.row
  elif is_empty:
    raise InputError("the documents hold no tokens at all, so there is nothing to pack")


class _OpenRow:
  """A row that is being filled.

  Attributes:
    row: its arrays.
    filled: how many of its tokens there are.
  """

  def __init__(self, seq_len: int):
    self.row = PackedRow(*(np.zeros(seq_len, t) for t in (np.int32, np.int32, bool, np.float32)))
    self.filled = self._segments = 0

  @property
  def room(self) -> int:
    return len(self.row.tokens_T) - self.filled

  def add(self, ids: np.ndarray, mask: np.ndarray, smoothing: float) -> int:
    """Adds a segment of as many of the tokens as there is room for; returns how many."""
    n = min(self.room, len(ids))
    part = slice(self.filled, self.filled + n)
    self._segments += 1
    self.row.tokens_T[part], self.row.mask_T[part] = ids[:n], mask[:n]
    self.row.segments_T[part], self.row.smoothing_T[part] = self._segments, smoothing
    self.filled += n
    return n


def label_mask(segments: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Returns the positions whose label is trained on, bool [..., T].

  The label of a position is the next token of its own segment, so there is none at the end of a
  segment or of the row, and in padding.

  Args:
    segments, mask: [..., T], as in `PackedRow`.
  """
  out = np.zeros(mask.shape, bool)
  same = segments[..., 1:] == segments[..., :-1]
  out[..., :-1] = mask[..., 1:] & same & (segments[..., :-1] != 0)
  return out


def to_inputs(tokens: np.ndarray, segments: np.ndarray, mask: np.ndarray) -> ModelRows:
  """Returns packed rows as a model reads them, and their labels (see `label_mask`).

  Args:
    tokens, segments, mask: [..., T], as in `PackedRow`.
  """
  if not tokens.shape == segments.shape == mask.shape or tokens.ndim < 1:
    raise InputError(
      f"tokens {tokens.shape}, segments {segments.shape} and mask {mask.shape} are rows of one "
      "shape; give all three as [..., T]"
    )
  t_T = np.arange(tokens.shape[-1], dtype=np.int32)
  first = np.insert(segments[..., 1:] != segments[..., :-1], 0, True, axis=-1)  # of its segment
  positions = t_T - np.maximum.accumulate(np.where(first, t_T, 0), axis=-1)
  labels = np.zeros_like(tokens, dtype=np.int32)
  labels[..., :-1] = tokens[..., 1:]
  return ModelRows(
    tokens.astype(np.int32),
    positions.astype(np.int32),
    segments.astype(np.int32),
    labels,
    label_mask(segments, mask),
  )


def _arrays(
  document: Document, number: int, eos_id: int | None
) -> tuple[np.ndarray, np.ndarray, float]:
  """Returns (ids int32, mask bool, label smoothing) of a document, its end token included."""
  masked = MaskedDocument(*document) if isinstance(document, tuple) else None
  ids = np.asarray(masked.ids if masked else document)
  smoothing = masked.smoothing if masked else 0.0
  if not ids.size:
    return np.zeros(0, np.int32), np.zeros(0, bool), smoothing
  if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= 2**31:
    raise InputError(
      f"document {number} is {ids.dtype} {ids.shape} from {ids.min()} to {ids.max()}; token ids "
      "are one row of integers from 0 to 2**31 - 1"
    )
  mask = np.asarray(masked.mask, bool) if masked else np.ones(len(ids), bool)
  if mask.shape != ids.shape:
    raise InputError(
      f"document {number} has {len(ids)} tokens and a mask of shape {mask.shape}; give one each"
    )
  if eos_id is not None:
    ids, mask = np.append(ids, eos_id), np.append(mask, mask[-1])
  return ids.astype(np.int32), mask, smoothing
