"""Sampling of weighted entries with the systematic sampler of records (docs/design.md)."""

from __future__ import annotations

import numpy as np

from distill_jax.cross_tokenizer.project import POINT


def resample(start_X: np.ndarray, weight_E: np.ndarray, n: int, u_X: np.ndarray) -> np.ndarray:
  """Draws n points of each distribution by systematic sampling.

  Point j of a distribution is (j + u) / n. The count of an entry is the number of points in its
  interval of the cumulative sum, i.e. a difference of ceilings. A distribution of n whole counts
  is unchanged.

  Args:
    start_X: int64 [X + 1], see Projected.
    weight_E: int64, see Projected. Each distribution is scaled to sum to 1.
    n: Number of points.
    u_X: float64 offsets in [0, 1).

  Returns:
    count_E, int64, which may be 0.
  """
  size_X = np.diff(start_X)
  end_E = np.cumsum(weight_E)
  ends = np.append(0, end_E)
  before_X, total_X = ends[start_X[:-1]], np.diff(ends[start_X])
  count_E = weight_E >> (POINT.bit_length() - 1)
  is_whole_E = (count_E * POINT) == weight_E
  whole_X = total_X == n * POINT
  broken = np.searchsorted(start_X, np.flatnonzero(~is_whole_E), "right") - 1
  whole_X[broken] = False
  draw = np.flatnonzero(~whole_X)
  if not len(draw):
    return count_E
  size, last = size_X[draw], np.cumsum(size_X[draw]) - 1
  owner = np.repeat(draw, size)
  at = np.arange(len(owner)) + np.repeat(start_X[draw] - (last + 1 - size), size)
  inside = (end_E[at] - before_X[owner]) / total_X[owner]
  points = np.ceil(n * inside - u_X[owner]).astype(np.int64)
  points[last] = n
  first = np.zeros(len(points), bool)
  first[last + 1 - size] = True
  count_E[at] = points - np.where(first, 0, np.append(0, points[:-1]))
  return count_E
