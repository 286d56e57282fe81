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

import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from distill_jax.errors import InputError
from distill_jax.records import bits, elias_fano, numbers
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


def decode_targets(fields: Mapping[str, bytes], mask_T: np.ndarray, spec: RecordSpec) -> Record:
  """Decodes the targets of a sequence, padded to n entries and T positions.

  Args:
    fields: The bytes of each stored field, from `encode_targets`.
    mask_T: bool, True at positions with targets.
    spec: The contents of a record.

  Returns:
    ids_TK int32 (ascending), argmax_T int32, label_logp_T float32; if stored, entropy_T float32 and
    logp_TK float32 (-inf in unused entries); for "sampled", weight_TK float32 (counts over n); for
    "labels", only label_logp_T and entropy_T. Where mask_T is not set, all are 0 (logp_TK is -inf).

  Raises:
    InputError: The fields are inconsistent.
  """
  scalars = decode_scalars(fields["scalars"], mask_T, spec.scalars)
  if spec.kind == "labels":
    return scalars
  head = _Head.of(fields["head"])
  layout = _layout(head, fields, mask_T, spec)
  ids_E = _ids(head, fields, layout, spec)
  slot_S, argmax_S = _argmax(head, fields, layout, ids_E)
  out = {
    IDS.read: layout.padded(ids_E, IDS.dtype),
    ARGMAX.read: layout.spread(argmax_S, ARGMAX.dtype),
  }
  return out | _values(fields, layout, slot_S, spec) | scalars


def encode_scalars(seq: Record, stored: Sequence[Field]) -> bytes:
  """Encodes fields with one number per position, one after another, where mask_T is set.

  Raises:
    InputError: A field is missing, or a number is not finite.
  """
  if missing := [f.record for f in stored if f.record not in seq]:
    raise InputError(f"A record lacks {missing[0]}, which its store holds. Pass it.")
  return b"".join(numbers.half(np.asarray(seq[f.record])[seq["mask_T"]], f.record) for f in stored)


def decode_scalars(data: bytes, mask_T: np.ndarray, stored: Sequence[Field]) -> Record:
  """Returns the fields from `encode_scalars`, float32 [T], 0 where mask_T is not set.

  Raises:
    InputError: The number of bytes is not that of these fields.
  """
  at_S = np.flatnonzero(mask_T)
  elias_fano.whole("bytes of scalars", len(data), 2 * len(at_S) * len(stored))
  out, numbers_FS = {}, np.frombuffer(data, "<f2").reshape(len(stored), len(at_S))
  for field, values_S in zip(stored, numbers_FS, strict=True):
    out[field.read] = np.zeros(len(mask_T), field.dtype)
    out[field.read][at_S] = values_S
  return out


class _Head(NamedTuple):
  """The counts at the beginning of a record.

  Attributes:
    positions: Number of positions with targets, S.
    entries: Number of entries of all positions, E.
    strays: Number of positions whose argmax is not among their entries.
    pieces: uint8, log2 sizes of the pieces of the id space.
  """

  positions: int
  entries: int
  strays: int
  pieces: np.ndarray

  @classmethod
  def of(cls, data: bytes) -> _Head:
    elias_fano.whole("bytes of head", len(data[:16]), 16)
    positions, entries, strays, pieces = struct.unpack_from("<IIII", data)
    elias_fano.whole("pieces", len(data) - 16, pieces)
    return cls(positions, entries, strays, np.frombuffer(data, np.uint8, pieces, 16))


class EntryLayout(NamedTuple):
  """The layout of a sequence's entries: concatenated as stored, and padded as read.

  Attributes:
    T: Number of positions of the padded array.
    K: Number of entries per position of the padded array.
    at_S: Positions with entries.
    M_S: Number of entries of each of them.
    starts_S: Index of the first entry of each of them, among all E.
    ends_S: Index after the last entry of each of them.
    place_E: Index of each entry in the flattened padded array.
  """

  T: int
  K: int
  at_S: np.ndarray
  M_S: np.ndarray
  starts_S: np.ndarray
  ends_S: np.ndarray
  place_E: np.ndarray

  @classmethod
  def of(cls, T: int, K: int, at_S: np.ndarray, M_S: np.ndarray) -> EntryLayout:
    ends_S = np.cumsum(M_S)
    starts_S = ends_S - M_S
    place_E = np.repeat(at_S * K - starts_S, M_S)
    place_E += np.arange(len(place_E))
    return cls(T, K, at_S, M_S, starts_S, ends_S, place_E)

  @property
  def entries(self) -> int:
    """Number of entries of all positions, E."""
    return len(self.place_E)

  def padded(
    self, values_E: np.ndarray, dtype: np.typing.DTypeLike, empty: float = 0
  ) -> np.ndarray:
    """Returns values of entries as a padded array [T, K]."""
    out = np.full(self.T * self.K, empty, dtype) if empty else np.zeros(self.T * self.K, dtype)
    out[self.place_E] = values_E
    return out.reshape(self.T, self.K)

  def spread(self, values_S: np.ndarray, dtype: np.typing.DTypeLike) -> np.ndarray:
    """Returns values of positions as an array [T], 0 at positions without targets."""
    out = np.zeros(self.T, dtype)
    out[self.at_S] = values_S
    return out


def _layout(
  head: _Head, fields: Mapping[str, bytes], mask_T: np.ndarray, spec: RecordSpec
) -> EntryLayout:
  at_S, S = np.flatnonzero(mask_T), head.positions
  elias_fano.whole("positions", S, len(at_S))
  if _is_full(head, spec):
    M_S = np.full(S, spec.n)
  else:
    M_S = bits.unpack(fields["lengths"], bits.width(spec.n), S).astype(int) + 1
  elias_fano.whole("entries", head.entries, int(M_S.sum()))
  return EntryLayout.of(len(mask_T), spec.n, at_S, M_S)


def _is_full(head: _Head, spec: RecordSpec) -> bool:
  """Returns True if every position has all ids as entries."""
  return head.entries == head.positions * spec.n == head.positions * spec.vocab_size


def _ids(
  head: _Head, fields: Mapping[str, bytes], layout: EntryLayout, spec: RecordSpec
) -> np.ndarray:
  """Returns the id of each entry."""
  if _is_full(head, spec):
    ids_E = np.tile(np.arange(spec.n), head.positions)
  else:
    ids_E = elias_fano.decode_ids(fields, head.pieces, layout.M_S, layout.starts_S, layout.ends_S)
  if layout.entries and int(ids_E.max()) >= spec.vocab_size:
    raise InputError(f"An id is {ids_E.max()}; expected ids below {spec.vocab_size}.")
  return ids_E


def _argmax(
  head: _Head, fields: Mapping[str, bytes], layout: EntryLayout, ids_E: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns, for each position, the index of the argmax's entry among all E, and its id.

  For strays, whose argmax is not an entry, these are an entry with the largest count, and the id
  that is stored separately.
  """
  data, S = fields["argmax"], head.positions
  slot_bits = bits.widths(layout.M_S)
  slot_bytes = (int(slot_bits.sum(dtype=np.int64)) + 7) // 8
  elias_fano.whole("bytes of argmax", len(data), slot_bytes + 8 * head.strays)
  slot_S = bits.unpack(data[:slot_bytes], slot_bits, S)
  elias_fano.whole("argmax slots", int((slot_S < layout.M_S).sum()), S)
  entry_S = slot_S + layout.starts_S
  argmax_S = ids_E[entry_S]
  if head.strays:
    stray = np.frombuffer(data, "<u4", 2 * head.strays, slot_bytes)
    argmax_S[stray[: head.strays]] = stray[head.strays :]
  return entry_S, argmax_S


def _values(
  fields: Mapping[str, bytes], layout: EntryLayout, argmax_entry_S: np.ndarray, spec: RecordSpec
) -> Record:
  """Returns the weights of sampled entries, and log-probabilities if stored."""
  out, E = {}, layout.entries
  if spec.kind == "sampled":
    counts_E = elias_fano.decode_counts(
      fields["counts"], argmax_entry_S, layout.starts_S, E, spec.n
    )
    out[WEIGHT.read] = layout.padded(_weights(spec.n)[counts_E], WEIGHT.dtype)
  if spec.has_logp:
    elias_fano.whole("bytes of logp", len(fields["logp"]), 2 * E)
    logp_E = np.frombuffer(fields["logp"], "<f2")
    out[LOGP.read] = layout.padded(logp_E, LOGP.dtype, LOGP.empty)
  return out


def _weights(n: int) -> np.ndarray:
  return (np.arange(n + 1) / n).astype(np.float32)


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
