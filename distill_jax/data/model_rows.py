"""Positions, labels and masks of packed rows, in numpy: this module does not import jax."""

from __future__ import annotations

import numpy as np


def positions(segments: np.ndarray) -> np.ndarray:
  """Returns positions counted from 0 in each segment and in the padding, int32 [..., T].

  Args:
    segments: Integers [..., T], as in `PackedRow`.
  """
  t_T = np.arange(segments.shape[-1], dtype=np.int32)
  is_first = np.insert(segments[..., 1:] != segments[..., :-1], 0, True, axis=-1)
  return t_T - np.maximum.accumulate(np.where(is_first, t_T, 0), axis=-1)


def next_tokens(tokens: np.ndarray) -> np.ndarray:
  """Returns the label of each position: the next token, and 0 at the last, int32 [..., T].

  Args:
    tokens: Integers [..., T].
  """
  labels = np.zeros(tokens.shape, np.int32)
  labels[..., :-1] = tokens[..., 1:]
  return labels


def label_mask(segments: np.ndarray, token_mask: np.ndarray) -> np.ndarray:
  """Returns the mask of positions whose label is trained on, bool [..., T].

  The label of a position is the next token of the same segment. So the last position of a segment
  or row has no label, and padding has none.

  Args:
    segments: Integers [..., T], as in `PackedRow`.
    token_mask: bool [..., T], True for tokens that are trained on, as in `PackedRow`.
  """
  out = np.zeros(token_mask.shape, bool)
  same = segments[..., 1:] == segments[..., :-1]
  out[..., :-1] = token_mask[..., 1:] & same & (segments[..., :-1] != 0)
  return out
