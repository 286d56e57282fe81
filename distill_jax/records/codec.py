"""Encoding of a teacher's targets for one sequence to bytes, lossless and vectorised.

The targets of a position are a set of entries with ascending ids, the entry of the teacher's
argmax, the log-probability of the label, and the entropy. Targets are stored only where mask_T is
set. Other positions only take the bits of their token. elias_fano.py documents the layout of
entries with measurements. Log-probabilities are float16.

In this module, S is the number of positions with targets, and E the number of entries of all of
them.

The next token could be stored as an index into the entries, which contain it seven times in eight.
That saves 1.2 of 40 bytes, but tokens would depend on targets, so it is not done.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from distill_jax.errors import InputError
from distill_jax.records import bits, elias_fano, numbers
from distill_jax.records.bits import Joined
from distill_jax.records.entry_layout import EntryLayout
from distill_jax.records.fields import (
  ARGMAX,
  ENTRIES,
  IDS,
  LOGP,
  WEIGHT,
  Field,
  Record,
  RecordSpec,
)


def encode_targets(seq: Record, spec: RecordSpec) -> dict[str, bytes]:
  """Encodes the teacher's targets where mask_T is set.

  Args:
    seq: The sequence: mask_T bool; ids_TN int ("sampled": nondecreasing points; "topk": any
      order), or fields.ENTRIES; argmax_T int; label_logp_T and entropy_T float; logp_TN float
      ("topk": -inf in unused entries).
    spec: The contents of a record.

  Returns:
    The bytes of each stored field, by name.

  Raises:
    InputError: Ids are outside the vocabulary or not sorted, or numbers are not finite.
  """
  mask = seq["mask_T"]
  # Checked first, because ids are meaningless where a teacher outputs NaN.
  out = {"scalars": encode_scalars(seq, spec.scalars)}
  if spec.kind == "labels":
    return out
  argmax = np.asarray(seq[ARGMAX.record])
  argmax_S = numbers.integers(argmax[mask], spec.vocab_size, ARGMAX.record)
  if ENTRIES[0] in seq:
    ids, M_S, given = _given_entries(seq, spec, len(argmax_S))
    return out | elias_fano.encode(ids, M_S, argmax_S, given, spec.n, spec.vocab_size)
  ids_SN = numbers.integers(np.asarray(seq[IDS.record])[mask], spec.vocab_size, IDS.record)
  if ids_SN.ndim != 2 or ids_SN.shape[1] != spec.n:
    shape = np.shape(seq[IDS.record])
    raise InputError(
      f"{IDS.record} is of shape {shape}; expected {spec.n} ids per position. Record with the "
      "settings of the store."
    )
  logp_SN: np.ndarray = np.zeros(0, np.float32)
  counts = None
  if spec.has_logp:
    logp_SN = np.asarray(seq[LOGP.record], LOGP.dtype)[mask]
  if spec.kind == "sampled":
    keep_SN = _first_of_runs(ids_SN)
    counts = np.diff(np.flatnonzero(keep_SN), append=ids_SN.size)
  else:
    ids_SN, logp_SN = _by_id(ids_SN, logp_SN)
    keep_SN = logp_SN > -np.inf
  M_S = keep_SN.sum(1)
  if len(M_S) and M_S.min() == 0:
    raise InputError("A position with targets has no entry. Unset its mask_T, or add an entry.")
  ids = ids_SN[keep_SN].astype(np.int64)
  out |= elias_fano.encode(ids, M_S, argmax_S, counts, spec.n, spec.vocab_size)
  if spec.has_logp:
    out["logp"] = numbers.half(logp_SN[keep_SN], LOGP.record)
  return out


def _given_entries(
  seq: Record, spec: RecordSpec, positions: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the ids, their number per position, and the counts of a record with fields.ENTRIES."""
  ids, counts, M_S = (np.asarray(seq[name]).astype(np.int64) for name in ENTRIES)
  numbers.integers(ids, spec.vocab_size, ENTRIES[0])
  ends = np.cumsum(M_S)
  fits = (
    (spec.kind, spec.logp) == ("sampled", False)
    and len(M_S) == positions
    and len(ids) == len(counts) == M_S.sum()
    and (not positions or M_S.min() > 0)
  )
  if fits and positions:
    rises = ids[1:] > ids[:-1]
    rises[ends[:-1] - 1] = True  # the next position begins
    sums = np.add.reduceat(counts, ends - M_S)
    fits = rises.all() and counts.min() > 0 and (sums == spec.n).all()
  if not fits:
    raise InputError(
      f"The entries of a record are inconsistent. Expected ascending ids with positive counts that "
      f'sum to {spec.n} at each of {positions} positions, for kind "sampled" without logp.'
    )
  return ids, M_S, counts


def decode_targets(fields: Mapping[str, Joined], mask_BT: np.ndarray, spec: RecordSpec) -> Record:
  """Decodes the targets of several sequences, padded to n entries and T positions.

  Args:
    fields: The bytes of each stored field, from `encode_targets`, of all sequences.
    mask_BT: bool, True at positions with targets.
    spec: The contents of a record.

  Returns:
    ids_TK int32 (ascending), argmax_T int32, label_logp_T float32; if stored, entropy_T float32 and
    logp_TK float32 (-inf in unused entries); for "sampled", weight_TK float32 (counts over n); for
    "labels", only label_logp_T and entropy_T. All have a first axis, B, of the sequences. Where
    mask_BT is not set, all are 0 (logp_TK is -inf).

  Raises:
    InputError: The fields are inconsistent.
  """
  at_S, S_B = np.flatnonzero(mask_BT), np.count_nonzero(mask_BT, axis=1).tolist()
  scalars = decode_scalars(fields["scalars"], mask_BT, spec.scalars)
  if spec.kind == "labels":
    return scalars
  head = _Heads.of(fields["head"].parts)
  numbers.whole("positions", head.positions_B, S_B)
  # If every position has all ids as entries, their ids need not be decoded.
  is_full = spec.n == spec.vocab_size and head.entries_B == [n * spec.n for n in S_B]
  if is_full:
    M_S = np.full(len(at_S), spec.n)
  else:
    M_S = fields["lengths"].unpack(bits.width(spec.n), S_B).astype(np.int64)
    M_S += 1
    if len(M_S) and (found := int(M_S.max())) > spec.n:
      raise InputError(f"A position has {found} entries; expected at most {spec.n}.")
  layout = EntryLayout.of((*mask_BT.shape, spec.n), S_B, at_S, M_S)
  numbers.whole("entries", head.entries_B, layout.entries_B)
  if is_full:
    ids_E = np.tile(np.arange(spec.n, dtype=np.uint32), len(at_S))
  else:
    ids_E = elias_fano.decode_ids(fields["high"], fields["low"], head.tables_B, layout)
  entry_S, argmax_S = _argmax(fields["argmax"], head, layout, ids_E)
  for ids in (ids_E, argmax_S):
    if len(ids) and (found := int(ids.max())) >= spec.vocab_size:
      raise InputError(f"An id is {found}; expected ids below {spec.vocab_size}.")
  out = {IDS.read: layout.padded(ids_E.view(IDS.dtype))}
  out[ARGMAX.read] = np.zeros(mask_BT.shape, ARGMAX.dtype)
  out[ARGMAX.read].reshape(-1)[at_S] = argmax_S
  if spec.kind == "sampled":
    counts_E = elias_fano.decode_counts(fields["counts"], entry_S, layout, spec.n)
    out[WEIGHT.read] = layout.padded(_weights(spec.n)[counts_E])
  if spec.has_logp:
    logp = fields["logp"]
    numbers.whole("bytes of logp", logp.size_B, [2 * n for n in layout.entries_B])
    logp_E = np.frombuffer(logp.data, "<f2").astype(LOGP.dtype)
    out[LOGP.read] = layout.padded(logp_E, LOGP.empty)
  return out | scalars


def encode_scalars(seq: Record, stored: Sequence[Field]) -> bytes:
  """Encodes fields with one number per position, one after another, where mask_T is set.

  Raises:
    InputError: A field is missing, or a number is not finite.
  """
  if missing := [f.record for f in stored if f.record not in seq]:
    raise InputError(f"A record lacks {missing[0]}, which its store holds. Pass it.")
  return b"".join(numbers.half(np.asarray(seq[f.record])[seq["mask_T"]], f.record) for f in stored)


def decode_scalars(data: Joined, mask_BT: np.ndarray, stored: Sequence[Field]) -> Record:
  """Returns the fields from `encode_scalars` of several sequences, float32 [B, T].

  They are 0 where mask_BT is not set.

  Raises:
    InputError: The number of bytes is not that of these fields.
  """
  S_B, count = np.count_nonzero(mask_BT, axis=1).tolist(), len(stored)
  numbers.whole("bytes of scalars", data.size_B, [2 * S * count for S in S_B])
  out, halves = {}, np.frombuffer(data.data, "<f2")
  for i, field in enumerate(stored):
    firsts = [start // 2 + i * S for start, S in zip(data.start_B, S_B, strict=True)]
    parts = [halves[first : first + S] for first, S in zip(firsts, S_B, strict=True)]
    out[field.read] = np.zeros(mask_BT.shape, field.dtype)
    out[field.read][mask_BT] = np.concatenate(parts)
  return out


class _Heads(NamedTuple):
  """The counts at the beginning of several records.

  Attributes:
    positions_B: Number of positions with targets.
    entries_B: Number of entries of all positions.
    strays_B: Number of positions whose argmax is not among their entries.
    tables_B: uint8, log2 sizes of the pieces of the id space.
  """

  positions_B: list[int]
  entries_B: list[int]
  strays_B: list[int]
  tables_B: list[bytes]

  @classmethod
  def of(cls, fields: Sequence[bytes]) -> _Heads:
    numbers.whole("bytes of head", [len(data[:16]) for data in fields], [16] * len(fields))
    counts = zip(*[struct.unpack_from("<4I", data) for data in fields], strict=True)
    positions_B, entries_B, strays_B, pieces_B = map(list, counts)
    numbers.whole("pieces", [len(data) - 16 for data in fields], pieces_B)
    return cls(positions_B, entries_B, strays_B, [data[16:] for data in fields])


def _argmax(
  field: Joined, head: _Heads, layout: EntryLayout, ids_E: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns, for each position, the index of the argmax's entry among all E, and its id.

  For strays, whose argmax is not an entry, these are an entry with the largest count, and the id
  that is stored separately.
  """
  after_B = [8 * n for n in head.strays_B]
  slot_S = field.unpack_widths(bits.widths(layout.M_S), layout.positions_B, after_B)
  if (slot_S >= layout.M_S).any():
    raise InputError("The argmax of a position is not among its entries.")
  entry_S = slot_S + layout.start_S
  argmax_S = ids_E[entry_S]
  for b, n in enumerate(head.strays_B):
    if n:
      end, first = field.start_B[b] + field.size_B[b], sum(layout.positions_B[:b])
      position, ids = np.frombuffer(field.data, "<u4", 2 * n, end - 8 * n).reshape(2, n)
      if position.max() >= layout.positions_B[b]:
        raise InputError("A stray argmax is at a position that its record does not have.")
      argmax_S[first + position] = ids
  return entry_S, argmax_S


@functools.cache
def _weights(n: int) -> np.ndarray:
  """Returns the weight of each count."""
  return (np.arange(n + 1) / n).astype(WEIGHT.dtype)


def _first_of_runs(ids_SN: np.ndarray) -> np.ndarray:
  first_SN = np.ones(ids_SN.shape, bool)
  steps = np.diff(ids_SN, axis=1)
  if steps.size and steps.min() < 0:
    raise InputError("The sampled ids of a position are not sorted. Sample in the order of ids.")
  first_SN[:, 1:] = steps > 0
  return first_SN


def _by_id(ids_SN: np.ndarray, logp_SN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the entries sorted by id, with unused ones last."""
  used = logp_SN != -np.inf
  numbers.finite(logp_SN[used], LOGP.record)
  order = np.argsort(np.where(used, ids_SN, 1 << 20), axis=1, kind="stable")
  ids_SN, logp_SN = (np.take_along_axis(x, order, 1) for x in (ids_SN, logp_SN))
  if np.any((ids_SN[:, 1:] == ids_SN[:, :-1]) & (logp_SN[:, 1:] > -np.inf)):
    raise InputError("A position of ids_TN has an id twice. Top-k entries must be distinct.")
  return ids_SN, logp_SN


def count_entries(fields: dict[str, bytes]) -> int:
  """Returns the number of entries of encoded targets; 0 for kinds without entries."""
  if "head" not in fields:
    return 0
  return struct.unpack_from("<II", fields["head"])[1]
