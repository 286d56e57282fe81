"""Encoding of the tokens, segments and loss mask of a record, or of a task's labels.

An id takes ceil(log2 V) bits. Segments and mask take 7 bytes at each position where they change.
"""

from __future__ import annotations

import struct

import numpy as np

from distill_jax.errors import InputError
from distill_jax.records import bits, numbers
from distill_jax.records.bits import Joined
from distill_jax.records.fields import Record, RecordSpec


def encode_tokens(seq: Record, spec: RecordSpec) -> bytes:
  """Encodes tokens_T (int), segments_T (int, at least 0) and mask_T (bool).

  Raises:
    InputError: A field has the wrong shape, dtype or range.
  """
  return _encode_ids("tokens_T", seq["tokens_T"], seq["segments_T"], seq["mask_T"], spec)


def encode_labels(seq: Record, spec: RecordSpec) -> bytes:
  """Encodes labels_T (int) and mask_T (bool) of an example, as tokens of one segment."""
  labels_T = np.asarray(seq["labels_T"])
  return _encode_ids("labels_T", labels_T, np.ones_like(labels_T), seq["mask_T"], spec)


def _encode_ids(
  name: str, ids_T: np.ndarray, segments_T: np.ndarray, mask_T: np.ndarray, spec: RecordSpec
) -> bytes:
  tokens = numbers.integers(ids_T, spec.vocab_size, name)
  T = len(tokens)
  segments, mask = np.asarray(segments_T), np.asarray(mask_T)
  if segments.shape != (T,) or mask.shape != (T,) or mask.dtype != np.bool_:
    raise InputError(
      f"A sequence of {T} tokens has segments_T of shape {segments.shape} and mask_T of shape "
      f"{mask.shape} and dtype {mask.dtype}. Both must have shape ({T},), and mask_T dtype bool."
    )
  segments = numbers.integers(segments, 1 << 20, "segments_T")
  if np.any(mask & (segments == 0)):
    raise InputError("mask_T is set at padding (where segments_T is 0). Unset it there.")
  # A run begins where the segment or the mask changes.
  both = segments.astype(np.int64) * 2 + mask
  starts = np.flatnonzero(np.append(True, both[1:] != both[:-1])) if T else np.zeros(0, np.int64)
  head = struct.pack("<II", T, len(starts))
  return b"".join(
    (
      head,
      bits.pack(starts, 32),
      bits.pack(both[starts], 24),
      bits.pack(tokens, bits.width(spec.vocab_size)),
    )
  )


def decode_tokens(field: Joined, T: int, spec: RecordSpec) -> Record:
  """Decodes tokens_T (int32), segments_T (int32) and mask_T (bool) of several records.

  Args:
    field: The bytes of all records, from `encode_tokens`.
    T: Number of tokens of a record.
    spec: The contents of a record.

  Returns:
    The fields, with a first axis of the records.

  Raises:
    InputError: The data are inconsistent.
  """
  fields, token_bits = field.parts, bits.width(spec.vocab_size)
  B = len(fields)
  numbers.whole("bytes of head", [len(data[:8]) for data in fields], [8] * B)
  T_B, runs_B = map(list, zip(*[struct.unpack_from("<II", data) for data in fields], strict=True))
  numbers.whole("tokens", T_B, [T] * B)
  after = (T * token_bits + 7) // 8
  sizes = [8 + 7 * n + after for n in runs_B]
  numbers.whole("bytes of tokens", field.size_B, sizes)
  starts = b"".join([data[8 : 8 + 4 * n] for data, n in zip(fields, runs_B, strict=True)])
  runs = [data[8 + 4 * n : 8 + 7 * n] for data, n in zip(fields, runs_B, strict=True)]
  tokens = [data[8 + 7 * n :] for data, n in zip(fields, runs_B, strict=True)]
  # The runs of all records, one record after another.
  first_B = range(0, B * T, T)
  starts_R = np.frombuffer(starts, "<u4") + np.repeat(first_B, runs_B)
  lengths_R = np.append(starts_R[1:], B * T) - starts_R
  begins_B = starts_R[numbers.starts(runs_B)].tolist() if min(runs_B) else []
  if begins_B != [*first_B] or lengths_R.min() < 1:
    raise InputError("The runs of a record are inconsistent.")
  both_R = Joined.of(runs).unpack(24, runs_B)
  tokens_X = Joined.of(tokens).unpack(token_bits, T_B).view(np.int32)
  if tokens_X.max() >= spec.vocab_size:
    raise InputError(f"A token id is {tokens_X.max()}; expected ids below {spec.vocab_size}.")
  shape = B, T
  return {
    "tokens_T": tokens_X.reshape(shape),
    "segments_T": np.repeat((both_R >> 1).astype(np.int32), lengths_R).reshape(shape),
    "mask_T": np.repeat((both_R & 1).astype(bool), lengths_R).reshape(shape),
  }


def decode_labels(field: Joined, T: int, spec: RecordSpec) -> Record:
  """Decodes labels_T (int32) and mask_T (bool), as `decode_tokens`."""
  seq = decode_tokens(field, T, spec)
  return {"labels_T": seq["tokens_T"], "mask_T": seq["mask_T"]}


def encode_smoothing(seq: Record) -> bytes:
  """Encodes smoothing_T, floats in [0, 1] that are equal within a segment, as a float16 each.

  Raises:
    InputError: The values differ within a segment or are out of range.
  """
  segments, x_T = np.asarray(seq["segments_T"]), np.asarray(seq["smoothing_T"])
  present, first = np.unique(segments, return_index=True)
  x_S = x_T[first][present > 0]
  real = segments > 0
  if not np.array_equal(x_T[real], x_S[np.searchsorted(present[present > 0], segments[real])]):
    raise InputError("smoothing_T differs within a segment. Use one value per document.")
  if np.any(~((x_S >= 0) & (x_S <= 1))):
    raise InputError(
      f"smoothing_T is from {x_S.min()} to {x_S.max()}; expected numbers from 0 to 1. Correct the "
      "confidence of the labels (data.trust)."
    )
  return numbers.half(x_S, "smoothing_T")


def decode_smoothing(data: bytes, segments_T: np.ndarray) -> np.ndarray:
  """Decodes smoothing_T, float32 [T]; 0 in padding."""
  present, at_T = np.unique(segments_T, return_inverse=True)
  padding = int(0 in present)
  numbers.whole("bytes of smoothing", [len(data)], [2 * (len(present) - padding)])
  x_S = np.frombuffer(data, "<f2").astype(np.float32)
  return np.concatenate([np.zeros(padding, np.float32), x_S])[at_T]
