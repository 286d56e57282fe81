"""The lengths of rows in the student's tokens, chosen by a sample of the teacher's rows.

A sample has blocks of consecutive rows at equal distances, of SAMPLE_TOKENS tokens together or a
single row, so it takes seconds for any store, and is the same in every call and process.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

from distill_jax.cross_tokenizer.align import SPELLING
from distill_jax.cross_tokenizer.rows import Record, align_rows
from distill_jax.cross_tokenizer.tables import PairTables
from distill_jax.errors import InputError, bad_value

SAMPLE_TOKENS = 2**18
BLOCKS = 16
BATCH_TOKENS = 2**13  # more tokens need more memory, 5 KB each, and are not faster
MAX_BATCH = 64  # rows
MULTIPLE = 128  # of the lengths of rows


class Source(Protocol):
  """Rows of text that are read by index, e.g. a store."""

  def __len__(self) -> int: ...

  def read_many(self, indices: Sequence[int]) -> Sequence[Record]:
    """Returns some rows, in the order of their indices."""


class Rows(NamedTuple):
  """Rows in the teacher's tokens.

  Attributes:
    source: The rows.
    length: Number of positions of a row.
    where: Their folder, for messages.
  """

  source: Source
  length: int
  where: str


def batches(rows: range, length: int) -> list[range]:
  """Returns a range of rows of `length` tokens in batches."""
  size = max(1, min(MAX_BATCH, BATCH_TOKENS // length))
  return [rows[i : i + size] for i in range(0, len(rows), size)]


def blocks(total: int, length: int) -> list[range]:
  """Returns the rows of a sample of `total` rows of `length` tokens, in batches."""
  rows = max(1, min(total, SAMPLE_TOKENS // length))
  if rows == total:
    return batches(range(total), length)
  count = min(BLOCKS, rows)
  size = rows // count
  starts = [i * (total - size) // max(count - 1, 1) for i in range(count)]
  return [part for start in starts for part in batches(range(start, start + size), length)]


def student_lengths(
  tables: PairTables, stores: Mapping[str, Rows], largest: int, trained: Collection[int] = ()
) -> dict[str, int]:
  """Returns the length of the student's rows of each store.

  Their ratios are those of the stores, so held-out rows have a length that is trained on, and
  batches of all lengths have the same number of tokens.

  Args:
    tables: The tables of both tokenizers.
    stores: The rows by name.
    largest: The length of the rows of the longest store (retarget.seq_len); 0: the smallest
      multiple of 128 with which the rows of all samples fit, or with equal tokenizers, that of the
      store.
    trained: Lengths that are trained on, if the stores are held out and these lengths are known.
      Each store has then the smallest one that holds its sample, or the largest one.

  Raises:
    InputError: The student's tokenizer spells no text of a sample, or `largest` cannot be divided.
  """
  needed = {name: longest(tables, rows) for name, rows in stores.items()}
  if trained:
    return {
      name: min((n for n in trained if n >= need), default=max(trained))
      for name, need in needed.items()
    }
  own = {name: rows.length for name, rows in stores.items()}
  top = max(own.values())
  parts = math.lcm(*(top // math.gcd(top, n) for n in own.values()))
  if 0 < largest * min(own.values()) // top < 2:
    raise bad_value("retarget.seq_len", largest, "rows of 2 tokens or more", "Raise it")
  if largest % parts:
    expected = f"a multiple of {parts}, because the stores have rows of {sorted(set(own.values()))}"
    raise bad_value("retarget.seq_len", largest, f"{expected} tokens", "Correct it")
  if not largest and tables.same:
    return own
  fits = max(-(-needed[name] * top // own[name]) for name in own)
  unit = math.lcm(MULTIPLE, parts)
  largest = largest or max(1, -(-fits // unit)) * unit
  return {name: largest * n // top for name, n in own.items()}


def longest(tables: PairTables, rows: Rows) -> int:
  """Returns the number of the student's tokens of the longest row of a sample.

  With equal tokenizers it is the length of the rows.

  Raises:
    InputError: No text of the sample has the student's tokens.
  """
  out, segments = 0, 0
  skipped: collections.Counter[str] = collections.Counter()
  for part in blocks(len(rows.source), rows.length):
    aligned = align_rows(tables, rows.source.read_many(part), rows.length)
    out = max(out, *aligned.lengths)
    skipped += aligned.skipped
    segments += len(set(aligned.aligned.segment_G.tolist())) + aligned.skipped.total()
  if segments and segments == skipped.total():
    raise InputError(_nothing(tables.student.tokenizer.where, rows.where, skipped))
  return rows.length if tables.same else out


def _nothing(student: str, where: str, skipped: collections.Counter[str]) -> str:
  """Returns the message for a sample without any text in the student's tokens."""
  (reason, count), total = skipped.most_common(1)[0], skipped.total()
  if reason == SPELLING:
    return (
      f"{student} spells none of the {total} texts of a sample of {where} back. Use a tokenizer "
      "that does not change texts."
    )
  return (
    f"None of the {total} texts of a sample of {where} can be aligned: {count} are skipped with "
    f"the reason {reason!r}. Use {student} for other texts, or set retarget.chat for chats."
  )
