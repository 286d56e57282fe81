"""Tables of tokens with another number of rows than the parameter, for draft models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import numpy as np

Finish = Callable[[], np.ndarray]


def resized(
  starts: Iterable[Callable[[], Finish]], found: int, wanted: int
) -> Iterator[Callable[[], Finish]]:
  """Yields functions that start to read the parts of a table which gets another number of rows.

  Rows after the last one that is wanted are read, since the checksum is that of the whole
  parameter, but they are not in the parts. A new row is the mean of all rows. So its logit is the
  mean of all logits, which is not above the highest, and it has at most a share of 1 / `found` of
  their probability. With rows of zeros, the logits would be 0, and in models whose logits are all
  negative these would be the most probable tokens.

  The parts must be finished in their order. In memory are the sum of the rows, which has the size
  of one, and the new rows, which are the last part.

  Args:
    starts: start to read the parts of the parameter, whole rows in their order.
    found: the number of rows of the parameter.
    wanted: the number of rows of the table.
  """
  total, before, dtype = np.float64(0), 0, np.dtype(np.float32)

  def cut(inner: Finish) -> np.ndarray:
    nonlocal total, before, dtype
    part = inner()
    total, dtype = total + part.sum(0, dtype=np.float64), part.dtype
    kept = part[: max(0, wanted - before)]
    before += len(part)
    return kept

  def start(begin: Callable[[], Finish]) -> Finish:
    return functools.partial(cut, begin())

  def new() -> np.ndarray:
    return np.tile((total / found).astype(dtype), (wanted - found, 1))

  for begin in starts:
    yield functools.partial(start, begin)
  if wanted > found:
    yield lambda: new
