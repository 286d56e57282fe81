"""Records whose arrays are stacked, as a batch needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distill_jax.records.fields import Record


class Stacked(Sequence):
  """Records with the same fields and shapes. `records[i]` is a dict of views of the arrays.

  Args:
    arrays: The fields of all records, with a first axis, B; {} for no records.

  Attributes:
    arrays: The same.
  """

  def __init__(self, arrays: dict[str, np.ndarray]):
    self.arrays = arrays

  @classmethod
  def of(cls, records: Sequence[Record]) -> Stacked:
    """Returns copies of records."""
    names = records[0] if records else {}
    return cls({name: np.stack([r[name] for r in records]) for name in names})

  @classmethod
  def joined(cls, parts: Sequence[Stacked]) -> Stacked:
    """Returns the records of some parts, in order. The arrays of a single part are not copied."""
    if len(parts) == 1:
      return parts[0]
    names = parts[0].arrays if parts else {}
    return cls({name: np.concatenate([part.arrays[name] for part in parts]) for name in names})

  def __len__(self) -> int:
    return len(next(iter(self.arrays.values()), ()))

  def __getitem__(self, index: Any) -> Any:
    if isinstance(index, slice):
      return Stacked({name: x[index] for name, x in self.arrays.items()})
    i = range(len(self))[index]
    return {name: x[i] for name, x in self.arrays.items()}
