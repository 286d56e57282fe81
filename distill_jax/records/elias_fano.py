"""Encoding of the entries of a sequence's positions: their ids, counts and the argmax.

Ids. They ascend within a position, so only the set is stored, with an Elias-Fano code (1974) that
is fitted to the record. The id space is cut into pieces whose lengths are powers of two and which
hold about the same number of entries of this record. An entry is stored as its piece, a unary gap
from the entry before, and its place in the piece, in log2(length) bits. The table of pieces takes
30 to 50 bytes per record. The fit pays off because frequent tokens have low ids.

Counts. They add up to N and most are 1, so they are stored in unary. The count of the argmax, the
largest, is omitted, because it is the remainder.

Argmax. Its index among the M entries is stored in ceil(log2 M) bits, so that the teacher's top
token is exact. A token that was not sampled can only be the argmax if all probabilities are below
1/N; such positions store the id itself.

Measured in bits per entry, with SmolLM2-135M on Python's language reference, for 2,048 tokens,
N = 63, V = 49,152, an entropy of 2.56 nats and 20.7 entries per token:

  ids     16 as ceil(log2 V); 12.6 with Elias-Fano; 10.95 fitted. DEFLATE gives 11.8 on byte planes
          of ids and 10.9 on those of gaps, but inflating takes as long as decoding everything here.
          For ids at random over V = 151,936: 18, 14.6 with Elias-Fano, 14.7 fitted.
  counts  6 as ceil(log2(N+1)); 1.8 in unary without the argmax, including its index.

A token then takes 39.9 bytes of payload, including its own id and the float16 scalars; 3 bytes per
entry plus 6 would be 68. With ids at random over V = 151,936 it takes 30 bytes for 10.3 entries and
38 bytes for 13.5. tools/bench/records_io.py measures the speed of decoding. Its bound is the number
of passes of numpy over the entries: two unary planes, a cumulative sum of widths, three gathers of
pieces and low bits, and a scatter into each padded array. Measured one by one with arrays in the
cache, all passes add up to 0.27 microseconds per token of 13.5 entries, the planes to a quarter.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from distill_jax.errors import InputError
from distill_jax.records import bits, numbers
from distill_jax.records.bits import Joined
from distill_jax.records.entry_layout import EntryLayout


def encode(
  ids: np.ndarray,
  M_S: np.ndarray,
  argmax_S: np.ndarray,
  counts: np.ndarray | None,
  n: int,
  vocab_size: int,
) -> dict[str, bytes]:
  """Encodes the concatenated entries of S positions.

  Args:
    ids: int64 ids, ascending within each position.
    M_S: Number of entries of each position, at least 1.
    argmax_S: The teacher's most probable id at each position.
    counts: Count of each entry, which sum to n at each position; None for top-k.
    n: See fields.RecordSpec.
    vocab_size: See fields.RecordSpec.

  Returns:
    The bytes of each stored field, by name.
  """
  starts, S, E = np.cumsum(M_S) - M_S, len(M_S), len(ids)
  table = _buckets(ids, S, bits.width(vocab_size))
  base = np.cumsum(1 << table.astype(np.int64)) - (1 << table.astype(np.int64))
  bucket = _bucket_of(ids, table)
  gaps = np.diff(bucket, prepend=0)
  gaps[starts] = bucket[starts]
  slot_S, stray_S = _argmax_slot(ids, M_S, starts, argmax_S, counts)
  out = {
    "head": struct.pack("<IIII", S, E, len(stray_S), len(table)) + table.tobytes(),
    "lengths": bits.pack(M_S - 1, bits.width(n)),
    "high": bits.unary(gaps),
    "low": bits.pack(ids - base[bucket], table[bucket]),
    "argmax": bits.pack(slot_S, bits.widths(M_S))
    + bits.pack(stray_S, 32)
    + bits.pack(argmax_S[stray_S], 32),
  }
  if counts is not None:
    others = np.ones(E, bool)
    others[starts + slot_S] = False
    out["counts"] = bits.unary(counts[others] - 1)
  return out


def _buckets(ids: np.ndarray, S: int, id_bits: int) -> np.ndarray:
  """Cuts the id space into pieces; returns their log2 sizes, in order.

  Pieces are halved while they hold more than a limit of entries. 1.2 pieces per entry of a position
  was the cheapest compromise between low bits and unary gaps.
  """
  if not len(ids):
    return np.array([id_bits], np.uint8)
  levels = [np.bincount(ids, minlength=1 << id_bits)]
  while len(levels[-1]) > 1:
    levels.append(levels[-1][::2] + levels[-1][1::2])
  limit = len(ids) / max(1.2 * len(ids) / S, 1)
  out, todo = [], [(id_bits, 0)]
  while todo:
    level, i = todo.pop()
    if level and levels[level][i] > limit:
      todo += [(level - 1, 2 * i + 1), (level - 1, 2 * i)]
    else:
      out.append(level)
  return np.array(out, np.uint8)


def _bucket_of(ids: np.ndarray, table: np.ndarray) -> np.ndarray:
  """Returns the index of the piece that holds each id, int64.

  Pieces consist of blocks of the size of the smallest piece, for which a table takes a quarter of
  the time of a binary search.
  """
  smallest = int(table.min())
  blocks = np.repeat(np.arange(len(table)), 1 << (table.astype(np.int64) - smallest))
  return blocks[ids >> smallest]


def _argmax_slot(
  ids: np.ndarray,
  M_S: np.ndarray,
  starts: np.ndarray,
  argmax_S: np.ndarray,
  counts: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the index of the argmax's entry at each position, and the positions without one.

  For the latter ("strays") the index is that of an entry with the largest count, or the first
  entry, and the id itself is stored. With counts, they occur only where all probabilities are below
  1/N.
  """
  hit = np.flatnonzero(ids == np.repeat(argmax_S, M_S))
  slot = np.full(len(M_S), -1, np.int64)
  position = np.searchsorted(starts, hit, side="right") - 1
  slot[position] = hit - starts[position]
  stray = np.flatnonzero(slot < 0)
  slot[stray] = 0
  if counts is not None:
    for s in stray:  # rare
      slot[s] = np.argmax(counts[starts[s] : starts[s] + M_S[s]])
  return slot, stray


def decode_ids(
  high: Joined, low: Joined, tables_B: Sequence[bytes], layout: EntryLayout
) -> np.ndarray:
  """Returns the id of each entry of several records, uint32.

  Args:
    high: The stored field "high".
    low: The stored field "low".
    tables_B: uint8, log2 sizes of the pieces of the id space of each record.
    layout: The layout of the entries.

  Raises:
    InputError: The fields are inconsistent.
  """
  place = high.ones("bucket marks", layout.entries_B)
  if not len(place):
    return np.zeros(0, np.uint32)
  before_S = np.zeros_like(layout.end_S)  # number of bits before the position
  before_S[1:] = place[layout.end_S[:-1] - 1]
  before_S[1:] += 1
  log_size = np.frombuffer(b"".join(tables_B), np.uint8).astype(np.uint32)
  size = np.int64(1) << log_size
  base = np.cumsum(size) - size
  pieces_S: np.ndarray | int = len(log_size)
  if len(tables_B) > 1:  # every record has its own plane and table, which are joined
    pieces_B, S_B = [len(table) for table in tables_B], layout.positions_B
    first_B = numbers.starts(pieces_B)
    for first, start, S in zip(numbers.starts(S_B), high.start_B, S_B, strict=True):
      if S:
        before_S[first] = 8 * start
    before_S -= np.repeat(first_B, S_B)
    pieces_S = np.repeat(np.cumsum(pieces_B), S_B)
    base -= np.repeat(np.append(0, np.cumsum(size))[first_B], pieces_B)
  # The one of entry e is at before_S + bucket + its number in the position, which layout.place_E
  # counts from row_S on.
  before_S -= layout.row_S
  place -= layout.place_E
  place -= np.repeat(before_S, layout.M_S)
  if (place[layout.end_S - 1] >= pieces_S).any():
    raise InputError("An entry is in a piece of the id space that its record does not have.")
  ids = low.unpack_widths(log_size[place], layout.entries_B)
  ids += base.astype(np.uint32)[place]
  return ids


def decode_counts(
  field: Joined, argmax_entry_S: np.ndarray, layout: EntryLayout, n: int
) -> np.ndarray:
  """Returns the count of each entry of several records, int64.

  Args:
    field: The stored field "counts".
    argmax_entry_S: Index of the argmax's entry of each position, among all entries.
    layout: The layout of the entries.
    n: Number of sampled points per position.

  Raises:
    InputError: The counts are inconsistent.
  """
  both = zip(layout.entries_B, layout.positions_B, strict=True)
  others_B = [entries - positions for entries, positions in both]
  place = field.ones("count marks", others_B)
  others = np.empty_like(place)
  np.subtract(place[1:], place[:-1], out=others[1:])
  for first, start, n_others in zip(numbers.starts(others_B), field.start_B, others_B, strict=True):
    if n_others:
      others[first] = place[first] + 1 - 8 * start
  E = len(layout.place_E)
  counts, is_other = np.zeros(E, np.int64), np.ones(E, bool)
  is_other[argmax_entry_S] = False
  counts[is_other] = others
  if E:
    rest_S = n - np.add.reduceat(counts, layout.start_S)
    if rest_S.min() < 1:
      raise InputError(f"The counts of a position add up to more than {n}, the number of points.")
    counts[argmax_entry_S] = rest_S
  return counts
