"""Packing of tokenized documents into rows of one length, and of rows into inputs and labels.

Documents are concatenated and cut at the end of each row. Each document, or piece of one, is a
segment of its row. Attention and positions never cross segments (types.Inputs).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from distill_jax.errors import InputError, bad_value


class MaskedDocument(NamedTuple):
  """A document with a mask of the tokens to train on.

  Attributes:
    ids: The token ids.
    mask: True for tokens that are trained on.
    smoothing: The label smoothing of all tokens.
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
    segments_T: int32, numbered from 1 within the row; 0 in padding.
    mask_T: bool, True for tokens that are trained on. The first token of a segment is never
      trained on, since no position predicts it (see `label_mask`).
    smoothing_T: float32, the label smoothing, equal for all tokens of a document.
  """

  tokens_T: np.ndarray
  segments_T: np.ndarray
  mask_T: np.ndarray
  smoothing_T: np.ndarray

  def record(self) -> dict[str, np.ndarray]:
    """Returns a record without targets; its mask is True at positions whose label is trained on."""
    mask_T = label_mask(self.segments_T, self.mask_T)
    return {"tokens_T": self.tokens_T, "segments_T": self.segments_T, "mask_T": mask_T}


class ModelRows(NamedTuple):
  """The inputs and labels of packed rows; each array is [..., T].

  Attributes:
    tokens: int32.
    positions: int32, counted from 0 in each segment and in the padding.
    segments: int32.
    labels: int32, the next token; 0 at the last position.
    mask: bool, True at positions whose label is trained on.
  """

  tokens: np.ndarray
  positions: np.ndarray
  segments: np.ndarray
  labels: np.ndarray
  mask: np.ndarray


def pack(
  documents: Iterable[Document], seq_len: int, eos_id: int | None, whole: bool = False
) -> Iterator[PackedRow]:
  """Packs documents into rows of `seq_len` tokens, in order; every token occurs once.

  Args:
    documents: Token ids, all of which are trained on, or masked documents. Empty ones are skipped.
    seq_len: The number of tokens per row, at least 2.
    eos_id: A token that is appended to every document, and trained on if the document's last token
      is. None: nothing is appended.
    whole: True to start a new row for a document that does not fit into the current one, so that
      only documents longer than a row are cut.

  Yields:
    The rows. The last one is padded. Only one row is in memory at a time.

  Raises:
    InputError: If an argument is invalid, a document is not a sequence of token ids, or there are
      no tokens.
  """
  if seq_len < 2:
    raise bad_value("seq_len", seq_len, "at least 2 tokens, for one label", "Increase it")
  if eos_id is not None and not 0 <= eos_id < 2**31:
    raise bad_value("eos_id", eos_id, "a token id, or None to append nothing", "Correct it")
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
    raise InputError("The documents contain no tokens. Use a corpus that contains text.")


class _OpenRow:
  """A row that is not full yet.

  Attributes:
    row: The row's arrays.
    filled: The number of tokens in the row.
  """

  def __init__(self, seq_len: int):
    self.row = PackedRow(*(np.zeros(seq_len, t) for t in (np.int32, np.int32, bool, np.float32)))
    self.filled = self._segments = 0

  @property
  def room(self) -> int:
    return len(self.row.tokens_T) - self.filled

  def add(self, ids: np.ndarray, mask: np.ndarray, smoothing: float) -> int:
    """Adds the first tokens as a segment, up to the row's end, and returns their number."""
    n = min(self.room, len(ids))
    part = slice(self.filled, self.filled + n)
    self._segments += 1
    self.row.tokens_T[part], self.row.mask_T[part] = ids[:n], mask[:n]
    self.row.segments_T[part], self.row.smoothing_T[part] = self._segments, smoothing
    self.filled += n
    return n


def label_mask(segments: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Returns the mask of positions whose label is trained on, bool [..., T].

  The label of a position is the next token of the same segment. So the last position of a segment
  or row has no label, and padding has none.

  Args:
    segments: int32 [..., T], as in `PackedRow`.
    mask: bool [..., T], True for tokens that are trained on, as in `PackedRow`.
  """
  out = np.zeros(mask.shape, bool)
  same = segments[..., 1:] == segments[..., :-1]
  out[..., :-1] = mask[..., 1:] & same & (segments[..., :-1] != 0)
  return out


def to_inputs(tokens: np.ndarray, segments: np.ndarray, mask: np.ndarray) -> ModelRows:
  """Returns the inputs and labels of packed rows (see `label_mask` for the mask of labels).

  Args:
    tokens: Integers [..., T], as in `PackedRow`.
    segments: Integers [..., T], as in `PackedRow`.
    mask: bool [..., T], True for tokens that are trained on, as in `PackedRow`.

  Raises:
    InputError: If the shapes differ.
  """
  if not tokens.shape == segments.shape == mask.shape or tokens.ndim < 1:
    raise InputError(
      f"tokens, segments and mask have the shapes {tokens.shape}, {segments.shape} and "
      f"{mask.shape}; expected one shape [..., T]."
    )
  t_T = np.arange(tokens.shape[-1], dtype=np.int32)
  first = np.insert(segments[..., 1:] != segments[..., :-1], 0, True, axis=-1)  # in its segment
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
  """Returns (ids int32, mask bool, label smoothing) for a document, including its end token."""
  masked = MaskedDocument(*document) if isinstance(document, tuple) else None
  ids = np.asarray(masked.ids if masked else document)
  smoothing = masked.smoothing if masked else 0.0
  if not ids.size:
    return np.zeros(0, np.int32), np.zeros(0, bool), smoothing
  if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= 2**31:
    raise InputError(
      f"Document {number} is an array of {ids.dtype} {ids.shape} from {ids.min()} to {ids.max()}; "
      "expected a sequence of token ids, integers from 0 to 2**31 - 1."
    )
  mask = np.asarray(masked.mask, bool) if masked else np.ones(len(ids), bool)
  if mask.shape != ids.shape:
    raise InputError(
      f"Document {number} has {len(ids)} tokens and a mask of shape {mask.shape}; expected one "
      "mask value per token."
    )
  if eos_id is not None:
    ids, mask = np.append(ids, eos_id), np.append(mask, mask[-1])
  return ids.astype(np.int32), mask, smoothing
