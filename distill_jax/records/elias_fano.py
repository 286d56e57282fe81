"""The entries of a sequence's positions: which ids, how often, and which is the likeliest.

Ids ascend within a position, so only the set is stored. The id space is cut into pieces,
powers of two long, each with about the same share of this record's entries: Elias-Fano
(1974) fitted to the record. An entry is its piece, as a unary gap from the entry before,
and its place in the piece, in as many bits as the piece is long. The cut is 30 to 50 bytes
a record. Token ids crowd at the low end (a tokenizer numbers its merges by frequency), and
the fit is what profits from it.

Counts add up to N and most are 1: unary, and the entry of the argmax, which has most of
them, is left out, since it is what remains. Its slot is stored, in ceil(log2 M) bits for M
entries: that tells the teacher's top token exactly. A token that was not sampled cannot be
the argmax unless no probability reaches 1/N; such positions carry the id itself.

Measured in bits an entry, on SmolLM2-135M over Python's language reference, 2,048 tokens, N
= 63, V = 49,152, 2.56 nats, 20.7 entries a token:

  ids     ceil(log2 V) 16; Elias-Fano 12.6; DEFLATEd byte planes of ids 11.8, of gaps 10.9
          (but inflating them alone would take as long as all of this); fitted 10.95. With
          ids scattered at random over V = 151,936: 18, Elias-Fano 14.6, fitted 14.7
  counts  ceil(log2(N+1)) 6; unary without the argmax, slot included 1.8

A token takes 39.9 bytes of payload there, its own id and float16 scalars included, where 3
bytes an entry and 6 would be 68. With ids scattered over V = 151,936, 30 at 10.3 entries
(37 allowed) and 38 at 13.5 (46). Decoding takes 0.25 microseconds a token on one idle core
(4 million tokens a second) into padded arrays, a fifth of it unary planes, a fifth low bits.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np

from distill_jax.errors import InputError
from distill_jax.records import bits


def encode(
  ids: np.ndarray,
  M_S: np.ndarray,
  argmax_S: np.ndarray,
  counts: np.ndarray | None,
  n: int,
  vocab_size: int,
) -> dict[str, bytes]:
  """The fields of entries laid end to end.

  Args:
    ids: int64, ascending within each position.
    M_S: entries of each of S positions, at least 1.
    argmax_S: the teacher's likeliest id at each.
    counts: of each entry, n in all at each position; None for top-k.
    n, vocab_size: as in fields.RecordSpec.
  """
  starts, S, E = np.cumsum(M_S) - M_S, len(M_S), len(ids)
  table = _buckets(ids, S, bits.width(vocab_size))
  base = np.cumsum(1 << table.astype(np.int64)) - (1 << table.astype(np.int64))
  bucket = np.searchsorted(base, ids, side="right") - 1
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
  """Cuts the id space where this record's ids are dense: log2 sizes of the pieces, in order.

  Pieces are halved while they hold more than a share of the entries; 1.2 pieces for every
  entry a position was the cheapest split between low bits and unary gaps.
  """
  if not len(ids):
    return np.array([id_bits], np.uint8)
  levels = [np.bincount(ids, minlength=1 << id_bits)]
  while len(levels[-1]) > 1:
    levels.append(levels[-1].reshape(-1, 2).sum(1))
  limit = len(ids) / max(1.2 * len(ids) / S, 1)
  out, todo = [], [(id_bits, 0)]
  while todo:
    level, i = todo.pop()
    if level and levels[level][i] > limit:
      todo += [(level - 1, 2 * i + 1), (level - 1, 2 * i)]
    else:
      out.append(level)
  return np.array(out, np.uint8)


def _argmax_slot(
  ids: np.ndarray,
  M_S: np.ndarray,
  starts: np.ndarray,
  argmax_S: np.ndarray,
  counts: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns which entry is the teacher's argmax, and the positions where none is.

  There the slot names an entry of the largest count (or the first one) and the id itself
  is stored: with counts that happens only where no probability reaches 1/N.
  """
  hit = np.flatnonzero(ids == np.repeat(argmax_S, M_S))
  slot = np.full(len(M_S), -1, np.int64)
  position = np.searchsorted(starts, hit, side="right") - 1
  slot[position] = hit - starts[position]
  stray = np.flatnonzero(slot < 0)
  slot[stray] = 0
  if counts is not None:
    for s in stray:  # rare by construction
      slot[s] = np.argmax(counts[starts[s] : starts[s] + M_S[s]])
  return slot, stray


def decode_ids(
  fields: Mapping[str, bytes],
  table: np.ndarray,
  M_S: np.ndarray,
  starts_S: np.ndarray,
  ends_S: np.ndarray,
) -> np.ndarray:
  """Returns the id of each entry.

  Args:
    fields: those that `encode` made.
    table: log2 sizes of the pieces that the id space is cut into.
    M_S, starts_S, ends_S: see codec.EntryLayout.
  """
  E = int(ends_S[-1]) if len(ends_S) else 0
  place = bits.ones(fields["high"])
  whole("bucket marks", len(place), E)
  if not E:
    return np.zeros(0, np.int64)
  # The one of entry e of a position is at (ones and zeros before the position) + bucket + e.
  before_S = np.append(0, place[ends_S[:-1] - 1] + 1)
  place -= np.repeat(before_S - starts_S, M_S)
  place -= np.arange(E)
  size = np.int64(1) << table.astype(np.int64)
  ids = bits.unpack(fields["low"], table[place], E)
  ids += (np.cumsum(size) - size).astype(np.uint32)[place]
  return ids


def decode_counts(
  data: bytes, argmax_entry_S: np.ndarray, starts_S: np.ndarray, E: int, n: int
) -> np.ndarray:
  """Returns how many of the n points of its position fell on each of E entries."""
  place = bits.ones(data)
  whole("count marks", len(place), E - len(starts_S))
  others = np.ones(E, bool)
  others[argmax_entry_S] = False
  counts = np.zeros(E, np.int64)
  counts[others] = np.diff(place, prepend=-1)
  counts[argmax_entry_S] = n - np.add.reduceat(counts, starts_S) if E else 0
  if E and counts.min() < 1:
    raise InputError(f"the counts of a position add up to more than the {n} points")
  return counts


def whole(noun: str, found: int, want: int) -> None:
  """Refuses a record that holds more or fewer of something than it should."""
  if found != want:
    raise InputError(f"a record holds {found} {noun} where {want} belong; record the shard again")
