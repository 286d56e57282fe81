"""Storage of features of chosen layers, as int8 with a float32 scale per vector."""

from __future__ import annotations

import numpy as np

from distill_jax.errors import InputError
from distill_jax.records.fields import TAPS, TAPS_SCALE, Record
from distill_jax.records.manifest import Taps


def projection(seed: int, width: int, to: int) -> np.ndarray:
  """Returns a reproducible random projection, float32 [width, to], of signs over sqrt(to).

  It approximately preserves lengths and angles (Achlioptas 2003). The signs are raw bits of Philox,
  a counter-based generator whose stream is fixed in numpy.
  """
  words = np.random.Philox(seed).random_raw((width * to + 63) // 64)
  signs = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")[: width * to]
  return ((2.0 * signs - 1) / np.sqrt(to)).astype(np.float32).reshape(width, to)


def dequantise(taps_PTD: np.ndarray, scale_PT: np.ndarray) -> np.ndarray:
  """Returns features of one record, float32 [P, T, D]."""
  return taps_PTD.astype(np.float32) * scale_PT[..., None]


def encode(seq: Record, m: Taps) -> bytes:
  """Encodes taps_PTD (int8) and taps_scale_PT (float32) at positions that are not padding.

  Raises:
    InputError: A field has the wrong shape or dtype, or is not finite.
  """
  q, scale, keep = seq[TAPS.record], seq[TAPS_SCALE.record], seq["segments_T"] > 0
  want = (len(m.layers), len(keep), m.width)
  if q.shape != want or q.dtype != np.int8 or scale.shape != want[:2]:
    raise InputError(
      f"taps_PTD is {q.dtype} {q.shape} with scales {scale.shape}; expected int8 {want} with "
      f"scales {want[:2]}. Record with the settings of the store."
    )
  if not np.all(np.isfinite(scale[:, keep])):
    raise InputError(
      "taps_scale_PT is not finite, because a hidden state of the teacher is not. Check the "
      "teacher, or set teacher.dtype=float32."
    )
  return q[:, keep].tobytes() + scale[:, keep].astype("<f4").tobytes()


def decode(data: bytes, segments_T: np.ndarray, m: Taps) -> Record:
  """Decodes taps_PTD and taps_scale_PT; 0 in padding.

  Raises:
    InputError: The data have the wrong length.
  """
  keep, P = segments_T > 0, len(m.layers)
  S = int(keep.sum())
  if len(data) != P * S * (m.width + 4):
    raise InputError(f"The taps have {len(data)} bytes; expected {P * S * (m.width + 4)}.")
  q = np.zeros((P, len(keep), m.width), np.int8)
  scale = np.zeros((P, len(keep)), np.float32)
  q[:, keep] = np.frombuffer(data, np.int8, P * S * m.width).reshape(P, S, m.width)
  scale[:, keep] = np.frombuffer(data, "<f4", P * S, P * S * m.width).reshape(P, S)
  return {TAPS.read: q, TAPS_SCALE.read: scale}
