"""Rows of packed text that stay in their store until they are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill_jax.records.fields import Record
from distill_jax.records.store import Store


class PackedRows(Sequence):
  """The first rows of a store of text, which are read by index: `len(rows)`, `rows[i]`.

  Args:
    store: The store.
    limit: The maximum number of rows; 0 for all.
  """

  def __init__(self, store: Store, limit: int = 0):
    self._store, self._len = store, min(len(store), limit or len(store))

  def __len__(self) -> int:
    return self._len

  def __getitem__(self, index: Any) -> Any:
    indices = range(self._len)[index]
    return self.read_many(indices) if isinstance(index, slice) else self._store[indices]

  def read_many(self, indices: Sequence[int]) -> Sequence[Record]:
    """Returns some rows, in the order of their indices."""
    return self._store.read_many(indices)
