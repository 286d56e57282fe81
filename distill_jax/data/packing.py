"""Packing of tokenized documents into rows.

Documents are concatenated and cut at the end of each row, or packed whole by best fit. Each
document, or piece of one, is a segment of its row. Attention and positions never cross segments
(types.Inputs).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from distill_jax.data import best_fit
from distill_jax.data.model_rows import label_mask
from distill_jax.errors import InputError, bad_value

WINDOW_ROWS = 128  # of the longest length; a window of documents has at least as many tokens


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
    token_mask_T: bool, True for tokens that are trained on. The first token of a segment is never
      trained on, since no position predicts it (see `label_mask`).
    smoothing_T: float32, the label smoothing, equal for all tokens of a document.
    stop: The number of tokens, in the order of the documents, that are in this row or rows before
      it, up to the last place from which the packing of the following rows can be repeated. This is
      the end of the row if documents are cut, and the end of the last full window otherwise.
  """

  tokens_T: np.ndarray
  segments_T: np.ndarray
  token_mask_T: np.ndarray
  smoothing_T: np.ndarray
  stop: int

  def record(self) -> dict[str, np.ndarray]:
    """Returns a record without targets; its mask is True at positions whose label is trained on."""
    mask_T = label_mask(self.segments_T, self.token_mask_T)
    return {"tokens_T": self.tokens_T, "segments_T": self.segments_T, "mask_T": mask_T}


def pack(
  documents: Iterable[Document], seq_len: int, eos_id: int | None, whole: bool = False
) -> Iterator[PackedRow]:
  """Packs documents into rows of `seq_len` tokens; every token occurs once.

  Args:
    documents: Token ids, all of which are trained on, or masked documents. Empty ones are skipped.
    seq_len: The number of tokens per row, at least 2.
    eos_id: A token that is appended to every document, and trained on if the document's last token
      is. None: nothing is appended.
    whole: True to cut only documents that are longer than a row; see `BestFitPacker`. False to
      concatenate documents; see `CutPacker`.

  Yields:
    The rows. If documents are cut, only the last one is padded.

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
  packer: Packer = BestFitPacker((seq_len,)) if whole else CutPacker(seq_len)
  is_empty = True
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

  @staticmethod
  def joined(blocks: Sequence[TokenBlock]) -> _Arrays:
    """Returns the arrays of blocks as one, without empty documents."""
    masks = [np.ones(len(b.ids_X), bool) if b.mask_X is None else b.mask_X for b in blocks]
    smoothing = [
      np.zeros(len(b.lengths_n), np.float32) if b.smoothing_n is None else b.smoothing_n
      for b in blocks
    ]
    lengths_n = np.concatenate([b.lengths_n for b in blocks])
    return _Arrays(
      np.concatenate([b.ids_X for b in blocks]),
      lengths_n[lengths_n > 0],
      np.concatenate(masks),
      np.concatenate(smoothing)[lengths_n > 0],
    )

  def split(self, documents: int) -> tuple[TokenBlock, TokenBlock]:
    """Returns a block of the first documents, and one of the others."""
    tokens = int(self.lengths_n[:documents].sum())
    first = TokenBlock(self.ids_X[:tokens], self.lengths_n[:documents])
    others = TokenBlock(self.ids_X[tokens:], self.lengths_n[documents:])
    if self.mask_X is not None:
      first = first._replace(mask_X=self.mask_X[:tokens])
      others = others._replace(mask_X=self.mask_X[tokens:])
    if self.smoothing_n is not None:
      first = first._replace(smoothing_n=self.smoothing_n[:documents])
      others = others._replace(smoothing_n=self.smoothing_n[documents:])
    return first, others


class _Arrays(NamedTuple):
  """The arrays of a block, all of which are present."""

  ids_X: np.ndarray
  lengths_n: np.ndarray
  mask_X: np.ndarray
  smoothing_n: np.ndarray


class CutPacker:
  """Concatenates documents and cuts them at the end of each row, in order.

  No space is lost, but most rows begin and end inside a document. Less than one row stays in
  memory.

  Args:
    seq_len: The number of tokens per row, T.

  Attributes:
    lengths: The lengths of rows.
  """

  def __init__(self, seq_len: int):
    self.lengths: tuple[int, ...] = (seq_len,)
    self._stop = self._documents = 0
    # The tokens that are not in a row yet: their ids, documents, mask and smoothing.
    types = (np.int32, np.int32, bool, np.float32)
    self._rest: tuple[np.ndarray, ...] = tuple(np.zeros(0, t) for t in types)

  def add(self, block: TokenBlock) -> Iterator[PackedRow]:
    """Yields the rows that are full after a block has been added."""
    ids_X, lengths_n, mask_X, smoothing_n = TokenBlock.joined([block])
    document_n = np.arange(self._documents, self._documents + len(lengths_n), dtype=np.int32)
    self._documents += len(lengths_n)
    documents_X, smoothing_X = (np.repeat(x, lengths_n) for x in (document_n, smoothing_n))
    added = (ids_X, documents_X, mask_X, smoothing_X)
    new = tuple(np.concatenate([a, b]) for a, b in zip(self._rest, added, strict=True))
    T, start = self.lengths[0], 0
    for stop in range(T, len(new[0]) + 1, T):
      yield self._row(*(x[start:stop] for x in new))
      start = stop
    self._rest = tuple(x[start:] for x in new)

  def finish(self) -> Iterator[PackedRow]:
    """Yields the last row, which is padded, if there are tokens left."""
    if len(self._rest[0]):
      yield self._row(*self._rest)

  def _row(
    self, ids: np.ndarray, documents: np.ndarray, mask: np.ndarray, smoothing: np.ndarray
  ) -> PackedRow:
    self._stop += len(ids)
    segments = documents - documents[0] + 1
    return _padded(self.lengths[0], ids, segments, mask, smoothing, self._stop)


class BestFitPacker:
  """Packs whole documents by best fit, window after window of documents.

  A window ends with the document that fills WINDOW_ROWS rows of the longest length. Its rows depend
  on nothing outside it: packing can be repeated from its beginning, and the same documents make the
  same rows, however they are divided into blocks. Only a document that is longer than the longest
  row is cut, into full rows and a rest.

  The last row of each window is half empty on average, which costs 1/256 = 0.4% of the space. In
  all, 0.7% are lost with log-normal lengths around 5,000 in rows of 32,768
  (tools/bench/packing.py). A window then has 4.2 million tokens and takes 21 MB, 5 bytes per token,
  and twice as much while its rows are made. To continue inside a window, it is tokenized again, in
  5 seconds on one core.

  Args:
    lengths: The lengths of rows, in ascending order. A document is packed into a row of the
      smallest length that holds it, or into the space that is left in a longer one.

  Attributes:
    lengths: The lengths of rows.
  """

  def __init__(self, lengths: Sequence[int]):
    self.lengths = tuple(lengths)
    self._blocks: list[TokenBlock] = []
    self._held = self._stop = 0  # tokens of the open window, and of those before it

  def add(self, block: TokenBlock) -> Iterator[PackedRow]:
    """Yields the rows of the windows that end in a block."""
    window = WINDOW_ROWS * self.lengths[-1]
    while self._held + len(block.ids_X) >= window:
      last = int(np.searchsorted(np.cumsum(block.lengths_n), window - self._held))
      first, block = block.split(last + 1)
      self._hold(first)
      yield from self.finish()
    self._hold(block)

  def finish(self) -> Iterator[PackedRow]:
    """Yields the rows of the open window."""
    if not self._held:
      return
    block = TokenBlock.joined(self._blocks)
    before = self._stop
    self._stop += self._held
    self._blocks, self._held = [], 0
    lengths_n, document_n = _pieces(block.lengths_n, self.lengths[-1])
    rows = best_fit.assign(lengths_n, self.lengths)
    ends_n = np.cumsum(lengths_n)
    spans = list(zip((ends_n - lengths_n).tolist(), ends_n.tolist(), strict=True))
    smoothing_n = block.smoothing_n[document_n]
    for number, (size, pieces) in enumerate(rows, 1):
      lengths = lengths_n[pieces]
      yield _padded(
        size,
        np.concatenate([block.ids_X[slice(*spans[i])] for i in pieces]),
        np.repeat(np.arange(1, len(pieces) + 1, dtype=np.int32), lengths),
        np.concatenate([block.mask_X[slice(*spans[i])] for i in pieces]),
        np.repeat(smoothing_n[pieces], lengths),
        self._stop if number == len(rows) else before,
      )

  def _hold(self, block: TokenBlock) -> None:
    """Adds a block to the open window."""
    if len(block.ids_X):
      self._blocks.append(block)
      self._held += len(block.ids_X)


Packer = CutPacker | BestFitPacker


def _pieces(lengths_n: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the lengths of pieces of at most `longest` tokens, and the document of each."""
  count_n = -(-lengths_n // longest)
  pieces_n = np.full(int(count_n.sum()), longest)
  pieces_n[np.cumsum(count_n) - 1] = lengths_n - (count_n - 1) * longest
  return pieces_n, np.repeat(np.arange(len(lengths_n)), count_n)


def _padded(
  size: int,
  ids: np.ndarray,
  segments: np.ndarray,
  mask: np.ndarray,
  smoothing: np.ndarray,
  stop: int,
) -> PackedRow:
  """Returns a row of `size` tokens."""
  arrays = [np.pad(x, (0, size - len(ids))) for x in (ids, segments, mask, smoothing)]
  return PackedRow(arrays[0], arrays[1], arrays[2], arrays[3], stop)


def _arrays(
  document: Document, number: int, eos_id: int | None
) -> tuple[np.ndarray, np.ndarray, float]:
  """Returns (ids int32, mask bool, label smoothing) for a document, including its end token."""
  masked = MaskedDocument(*document) if isinstance(document, tuple) else None
  ids = np.asarray(masked.ids if masked else document)
  smoothing = masked.smoothing if masked else 0.0
  if not ids.size:
    return np.zeros(0, np.int32), np.zeros(0, bool), smoothing
  is_list = ids.ndim == 1 and ids.dtype.kind in "iu"
  if not is_list or ids.min() < 0 or ids.max() >= 2**31:
    found = f" from {ids.min()} to {ids.max()}" if is_list else ""
    raise InputError(
      f"Document {number} is an array of {ids.dtype} {ids.shape}{found}; expected a sequence of "
      "token ids, integers from 0 to 2**31 - 1. Tokenize it first."
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
