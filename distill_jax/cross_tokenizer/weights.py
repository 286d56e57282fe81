"""Weighted entries of distributions: sums of equal ones, and systematic samples (docs/design.md).

Weights are integers in units of POINT, a sampled point. Integers make sums independent of their
order, and whole counts stay whole. 2^-40 of a point is less than the rounding of a float64 sum.

In this module, X are distributions and E entries of all of them.
"""

from __future__ import annotations

import numpy as np

POINT_BITS = 40
POINT = 1 << POINT_BITS


def group(
  whole: tuple[np.ndarray, np.ndarray, np.ndarray],
  parts: tuple[np.ndarray, np.ndarray, np.ndarray],
  rows: int,
  vocab_size: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Sums the weights of entries with equal ids of a distribution.

  Args:
    whole: x int64, id and count of entries with whole counts of points, below 2^15. Those with the
      count 0 are omitted.
    parts: x int64, id and weight of others.
    rows: Number of distributions, X.
    vocab_size: Number of ids.

  Returns:
    start_X int64 [X + 1], the index of the first entry of each distribution, and their number;
    id_E int64, ascending within a distribution; weight_E int64.
  """
  # A count, or the index of a weight after all counts, is in the low bits: sorting integers is
  # several times faster than argsort, and no weight has to be looked up.
  counts, id_bits = 1 << 15, int(vocab_size).bit_length()
  bits = (counts + len(parts[0])).bit_length()
  key = whole[0] << id_bits
  key |= whole[1]
  key <<= bits
  key |= whole[2]
  if not whole[2].all():
    key = key[whole[2] > 0]
  part_key = (parts[0] << id_bits | parts[1]) << bits | np.arange(counts, counts + len(parts[0]))
  key = np.concatenate([key, part_key[parts[2] > 0]])
  key.sort()
  weight = key & ((1 << bits) - 1)
  some = np.flatnonzero(weight >= counts)
  given = parts[2][weight[some] - counts]
  weight <<= POINT_BITS
  weight[some] = given
  key >>= bits
  is_first = np.ones(len(key), bool)
  np.not_equal(key[1:], key[:-1], out=is_first[1:])
  first = np.flatnonzero(is_first)
  if len(first) < len(key):
    weight, key = np.add.reduceat(weight, first), key[first]
  start = np.searchsorted(key, np.arange(rows + 1) << id_bits)
  key &= (1 << id_bits) - 1
  return start, key, weight


def resample(
  start_X: np.ndarray, weight_E: np.ndarray, drawn: np.ndarray, n: int, u: np.ndarray
) -> np.ndarray:
  """Draws n points of some distributions by systematic sampling.

  Point j of a distribution is (j + u) / n. The count of an entry is the number of points in its
  interval of the cumulative sum, i.e. a difference of ceilings.

  Args:
    start_X: int64 [X + 1], see `group`.
    weight_E: int64, see `group`. The drawn distributions are scaled to sum to 1; the others consist
      of n whole counts.
    drawn: int64, indices of the distributions to draw from.
    n: Number of points.
    u: float64 offsets in [0, 1) of the drawn distributions.

  Returns:
    The count of each entry, int64, which may be 0.
  """
  count_E = weight_E >> POINT_BITS
  if not len(drawn):
    return count_E
  at, size = entries_of(start_X[drawn], start_X[drawn + 1])
  last = np.cumsum(size) - 1
  first = last + 1 - size
  sums = np.cumsum(weight_E[at])  # it may overflow, but not the differences
  before = sums[first] - weight_E[at[first]]
  inside = (sums - np.repeat(before, size)) / np.repeat(sums[last] - before, size)
  points = np.ceil(n * inside - np.repeat(u, size)).astype(np.int64)
  points[last] = n
  previous = np.append(0, points[:-1])
  previous[first] = 0
  count_E[at] = points - previous
  return count_E


def entries_of(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the indices of the entries from each start to its end, and their numbers, int64."""
  size = end - start
  shift = start - (np.cumsum(size) - size)
  at = np.repeat(shift, size)
  at += np.arange(len(at))
  return at, size
