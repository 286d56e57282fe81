"""Best-fit packing of lengths into rows, longest first."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Row(NamedTuple):
  """A row and what is packed into it.

  Attributes:
    size: The number of tokens of the row.
    items: The indices of the items in it, in ascending order.
  """

  size: int
  items: list[int]


def assign(length_n: np.ndarray, sizes: Sequence[int]) -> list[Row]:
  """Assigns items to rows.

  The items are taken from the longest to the shortest. Each goes into the row with the least space
  that holds it. If no row holds it, it opens a row of the smallest size that does. So the space
  that is left in long rows is filled with shorter items before these open short rows.

  The rows are in the order of the items that opened them. This order does not depend on lengths, so
  the first rows have the same mixture of lengths as all rows.

  n items take O(n log n) steps, plus the insertions into a sorted list of at most all open rows.

  Args:
    length_n: The lengths, each from 1 to the largest size.
    sizes: The sizes of rows, in ascending order.
  """
  order = np.argsort(-length_n, kind="stable").tolist()
  lengths: list[int] = length_n.tolist()
  size_n: list[int] = np.asarray(sizes)[np.searchsorted(sizes, length_n)].tolist()
  rows: list[Row] = []
  spaces: list[tuple[int, int]] = []  # (space, index of the row) of rows with space, ascending
  for item in order:
    at = bisect.bisect_left(spaces, (lengths[item], 0))
    if at == len(spaces):
      space, row = size_n[item], len(rows)
      rows.append(Row(space, []))
    else:
      space, row = spaces.pop(at)
    rows[row].items.append(item)
    if space > lengths[item]:
      bisect.insort(spaces, (space - lengths[item], row))
  rows.sort(key=lambda row: row.items[0])
  return [Row(row.size, sorted(row.items)) for row in rows]
