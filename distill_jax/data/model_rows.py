"""Inputs and labels of packed rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from distill_jax.errors import InputError


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
