"""A sample of a store: the length of its rows in the student's tokens, and what a run would do.

It has blocks of consecutive rows at equal distances, of SAMPLE_TOKENS tokens together or a single
row, so it takes seconds for any store, and is the same in every call.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Mapping

from distill_jax.cross_tokenizer.align import SPELLING
from distill_jax.cross_tokenizer.rows import align_rows
from distill_jax.cross_tokenizer.statistics import Statistics
from distill_jax.cross_tokenizer.tables import PairTables
from distill_jax.errors import InputError, bad_value
from distill_jax.records import tf_example
from distill_jax.records.manifest import Manifest
from distill_jax.records.store import Store
from distill_jax.retarget import convert
from distill_jax.retarget.convert import Conversion

SAMPLE_TOKENS = 2**18
BLOCKS = 16
MULTIPLE = 128  # of the lengths of rows


@dataclasses.dataclass(frozen=True)
class Measured:
  """The conversion of a sample.

  Attributes:
    statistics: The statistics of its rows.
    bytes: The size of its records.
    seconds: The processor time that it took.
  """

  statistics: Statistics
  bytes: int
  seconds: float


def blocks(store: Store) -> list[range]:
  """Returns the rows of the sample of a store."""
  total = len(store)
  rows = max(1, min(total, SAMPLE_TOKENS // store.manifest.seq_len))
  if rows == total:
    return convert.batches(range(total), store.manifest.seq_len)
  count = min(BLOCKS, rows)
  size = rows // count
  starts = [i * (total - size) // max(count - 1, 1) for i in range(count)]
  wholes = [range(start, start + size) for start in starts]
  return [part for whole in wholes for part in convert.batches(whole, store.manifest.seq_len)]


def length(tables: PairTables, store: Store) -> int:
  """Returns the smallest multiple of 128 that holds the rows of the sample in the student's tokens.

  Raises:
    InputError: The student's tokenizer spells no text of the sample.
  """
  longest = _longest(tables, store)
  return longest if tables.same else max(1, -(-longest // MULTIPLE)) * MULTIPLE


def lengths(tables: PairTables, stores: Mapping[str, Store], largest: int) -> dict[str, int]:
  """Returns the length of the student's rows of each store.

  Their ratios are those of the stores, so held-out rows have a length that is trained on, and
  batches of all lengths have the same number of tokens.

  Args:
    tables: The tables of both tokenizers.
    stores: The stores by name.
    largest: The length of the rows of the longest store; 0: the smallest multiple of 128 with which
      the rows of all samples fit, or with equal tokenizers, that of the store.

  Raises:
    InputError: The student's tokenizer spells no text of a sample, or `largest` cannot be divided.
  """
  own = {name: store.manifest.seq_len for name, store in stores.items()}
  needed = {name: _longest(tables, store) for name, store in stores.items()}
  top = max(own.values())
  parts = math.lcm(*(top // math.gcd(top, n) for n in own.values()))
  if largest % parts:
    expected = f"a multiple of {parts}, because the stores have rows of {sorted(set(own.values()))}"
    raise bad_value("retarget.seq_len", largest, f"{expected} tokens", "Correct it")
  if not largest and tables.same:
    return own
  fits = max(-(-needed[name] * top // own[name]) for name in own)
  unit = math.lcm(MULTIPLE, parts)
  largest = largest or max(1, -(-fits // unit)) * unit
  return {name: largest * n // top for name, n in own.items()}


def _longest(tables: PairTables, store: Store) -> int:
  """Returns the number of the student's tokens of the longest row of a sample.

  With equal tokenizers it is the length of the rows.
  """
  own, longest, segments = store.manifest.seq_len, 0, 0
  skipped: collections.Counter[str] = collections.Counter()
  for rows in blocks(store):
    aligned = align_rows(tables, store.read_many(rows), own)
    longest = max(longest, *aligned.lengths)
    skipped += aligned.skipped
    segments += len(set(aligned.aligned.segment_G.tolist())) + aligned.skipped.total()
  if segments and segments == skipped.total():
    raise InputError(_nothing(tables.student.tokenizer.where, store, skipped))
  return own if tables.same else longest


def _nothing(student: str, store: Store, skipped: collections.Counter[str]) -> str:
  """Returns the message for a sample without any text in the student's tokens."""
  (reason, count), total = skipped.most_common(1)[0], skipped.total()
  if reason == SPELLING:
    return (
      f"{student} spells none of the {total} texts of a sample of {store.folder} back. Use a "
      "tokenizer that does not change texts."
    )
  return (
    f"None of the {total} texts of a sample of {store.folder} can be aligned: {count} are skipped "
    f"with the reason {reason!r}. Use {student} for other texts, or set retarget.chat for chats."
  )


def measure(conversion: Conversion, store: Store, target: Manifest) -> Measured:
  """Converts the sample of a store, and writes nothing.

  Args:
    conversion: How rows are converted.
    store: The store in the teacher's tokens.
    target: The manifest of the store in the student's tokens.
  """
  total, size, start = Statistics(), 0, time.process_time()
  for rows in blocks(store):
    records, statistics = conversion.rows(store, rows, target.seq_len)
    total += statistics
    for i, record in zip(rows, records, strict=True):
      size += len(tf_example.serialize(tf_example.encode(i, record, target)))
  return Measured(total, size, time.process_time() - start)
