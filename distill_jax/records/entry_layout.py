"""The layout of entries: concatenated as stored, and padded as read."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class EntryLayout(NamedTuple):
  """The layout of the entries of several records.

  S and E count the positions and entries of all records, in order.

  Attributes:
    shape: Number of records, of positions per record, and of entries per position, of the padded
      array: (B, T, K).
    positions_B: Number of positions with entries of each record.
    entries_B: Number of entries of each record.
    M_S: Number of entries of each position with entries.
    start_S: Index of the first entry of each of them, among all E.
    end_S: Index after the last entry of each of them.
    row_S: Index of the first entry of each of them in the flattened padded array.
    place_E: Index of each entry in the flattened padded array.
  """

  shape: tuple[int, int, int]
  positions_B: list[int]
  entries_B: list[int]
  M_S: np.ndarray
  start_S: np.ndarray
  end_S: np.ndarray
  row_S: np.ndarray
  place_E: np.ndarray

  @classmethod
  def of(
    cls, shape: tuple[int, int, int], positions_B: list[int], at_S: np.ndarray, M_S: np.ndarray
  ) -> EntryLayout:
    """Returns the layout.

    Args:
      shape: See above.
      positions_B: See above.
      at_S: Positions with entries, among all B T.
      M_S: See above.
    """
    end_S, row_S = np.cumsum(M_S), at_S * shape[2]
    start_S = end_S - M_S
    entries = np.append(0, end_S)[np.cumsum([0, *positions_B])]
    place_E = np.repeat(row_S - start_S, M_S)
    place_E += np.arange(len(place_E))
    entries_B = np.diff(entries).tolist()
    return cls(shape, positions_B, entries_B, M_S, start_S, end_S, row_S, place_E)

  def padded(self, values_E: np.ndarray, empty: float = 0) -> np.ndarray:
    """Returns values of entries as a padded array [B, T, K]."""
    out = (
      np.full(self.shape, empty, values_E.dtype) if empty else np.zeros(self.shape, values_E.dtype)
    )
    out.reshape(-1)[self.place_E] = values_E
    return out
