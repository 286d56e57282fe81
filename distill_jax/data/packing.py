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
    stop: The number of tokens in this row and all rows before it, without padding.
  """

  tokens_T: np.ndarray
  segments_T: np.ndarray
  mask_T: np.ndarray
  smoothing_T: np.ndarray
  stop: int

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
  packer, is_empty = Packer(seq_len, whole), True
  for number, document in enumerate(documents):
    ids, mask, smoothing = _arrays(document, number, eos_id)
    is_empty &= not len(ids)
    yield from packer.add(
      TokenBlock(ids, np.array([len(ids)]), mask, np.array([smoothing], np.float32))
    )
  yield from packer.finish()
  if is_empty:
    raise InputError("The documents contain no tokens. Use a corpus that contains text.")


class TokenBlock(NamedTuple):
  """Consecutive documents as tokens.

  Attributes:
    ids_X: int32, the tokens of all documents.
    lengths_n: The number of tokens of each document.
    mask_X: bool, True for tokens that are trained on; None for all.
    smoothing_n: float32, the label smoothing of each document; None for none.
  """

  ids_X: np.ndarray
  lengths_n: np.ndarray
  mask_X: np.ndarray | None = None
  smoothing_n: np.ndarray | None = None

  def after(self, tokens: int) -> TokenBlock:
    """Returns the block without its first tokens, which may begin inside a document."""
    kept_n = np.minimum(self.lengths_n, np.maximum(np.cumsum(self.lengths_n) - tokens, 0))
    mask_X = None if self.mask_X is None else self.mask_X[tokens:]
    return TokenBlock(self.ids_X[tokens:], kept_n, mask_X, self.smoothing_n)


class Packer:
  """Packs blocks of documents into rows, in order. Less than one row stays in memory.

  Args:
    seq_len: The number of tokens per row, T.
    whole: See `pack`.
  """

  def __init__(self, seq_len: int, whole: bool):
    self._seq_len, self._whole, self._stop = seq_len, whole, 0
    # The tokens that are not in a row yet: their ids, documents, mask and smoothing.
    types = (np.int32, np.int32, bool, np.float32)
    self._rest: tuple[np.ndarray, ...] = tuple(np.zeros(0, t) for t in types)
    self._documents = 0

  def add(self, block: TokenBlock) -> Iterator[PackedRow]:
    """Yields the rows that are full after a block has been added."""
    lengths_n = block.lengths_n[block.lengths_n > 0]
    document_n = np.arange(self._documents, self._documents + len(lengths_n), dtype=np.int32)
    self._documents += len(lengths_n)
    mask_X, smoothing_X = block.mask_X, np.zeros(len(block.ids_X), np.float32)
    if block.smoothing_n is not None:
      smoothing_X = np.repeat(block.smoothing_n[block.lengths_n > 0], lengths_n)
    if mask_X is None:
      mask_X = np.ones(len(block.ids_X), bool)
    added = (block.ids_X, np.repeat(document_n, lengths_n), mask_X, smoothing_X)
    new = tuple(np.concatenate([a, b]) for a, b in zip(self._rest, added, strict=True))
    ends = self._whole_ends(new[1]) if self._whole else self._full_ends(len(new[0]))
    start = 0
    for stop in ends:
      yield self._row(*(x[start:stop] for x in new))
      start = stop
    self._rest = tuple(x[start:] for x in new)

  def finish(self) -> Iterator[PackedRow]:
    """Yields the last row, which is padded, if there are tokens left."""
    if len(self._rest[0]):
      yield self._row(*self._rest)

  def _full_ends(self, tokens: int) -> range:
    """Returns the ends of full rows."""
    return range(self._seq_len, tokens + 1, self._seq_len)

  def _whole_ends(self, document_X: np.ndarray) -> Iterator[int]:
    """Yields the ends of rows that no document extends into, unless it is longer than a row."""
    start, T = 0, self._seq_len
    if not len(document_X):
      return
    starts = np.flatnonzero(np.diff(document_X, prepend=-1)).tolist()
    for first, end in zip(starts, [*starts[1:], len(document_X)], strict=True):
      if end - start > T and first > start:
        yield first
        start = first
      while end - start >= T:
        start += T
        yield start

  def _row(
    self, ids: np.ndarray, documents: np.ndarray, mask: np.ndarray, smoothing: np.ndarray
  ) -> PackedRow:
    segments = documents - documents[0] + 1
    self._stop += len(ids)
    padding = (0, self._seq_len - len(ids))
    arrays = [np.pad(x, padding) for x in (ids, segments, mask, smoothing)]
    return PackedRow(arrays[0], arrays[1], arrays[2], arrays[3], self._stop)


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
