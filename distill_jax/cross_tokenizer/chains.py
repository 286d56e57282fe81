"""Positions of the teacher, and splits of their mass, that a student token's exact target reads.

The target of a student token reads the teacher's distribution at the position that predicts the
teacher token in which the student token begins and, while that token's own mass is to be split
further, at the positions after it: a chain of levels. All that depends on the text alone is
computed here, on the host; `dense.py` computes the rest on the devices.

A split maps each of the teacher's tokens to the student token that it leads to, after some bytes
that are known already. In the order of their bytes, the teacher's tokens that lead to one student
token are a few ranges, the pieces of the split. There is a split for each look-ahead state of the
tables, and one for each proper prefix of a token, for positions inside of it. The pieces of all
splits take at most 12 bytes per byte of the teacher's vocabulary, 12 MB for 128,256 tokens, and 12
per range of the look-ahead states.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from distill_jax.cross_tokenizer.align import Aligned
from distill_jax.cross_tokenizer.tables import PairTables

DEPTH = 4  # maximum number of levels; a chain that is longer ends at this one


@dataclasses.dataclass(frozen=True)
class Splits:
  """The splits of a pair of tokenizers: first those of the states, then those of the prefixes.

  Attributes:
    order: The teacher's tokens in the order of their bytes, control tokens last, int32 [V].
    first: Index of the first piece of each split, and the number of pieces, int32 [splits + 1].
    start: First rank of each piece, int32.
    end: The rank after its last, int32.
    token: The student token of each piece, int32.
    of_prefix: The split of the first r bytes of token t, at offset_V[t] + r, int32; -1 elsewhere.
  """

  order: np.ndarray
  first: np.ndarray
  start: np.ndarray
  end: np.ndarray
  token: np.ndarray
  of_prefix: np.ndarray

  @functools.cached_property
  def rank_V(self) -> np.ndarray:
    """The place of each token in `order`, int64. Rows are aligned one by one, so it is kept."""
    return np.argsort(self.order)

  @classmethod
  def of(cls, tables: PairTables) -> Splits:
    """Returns the splits of a pair."""
    order = np.argsort(tables.rank_V, kind="stable")
    states, *of_states = tables.state_pieces()
    splits, of_prefix, *of_prefixes = _prefix_pieces(tables, order, states)
    owner, start, end, token = map(np.concatenate, zip(of_states, of_prefixes, strict=True))
    first = np.searchsorted(owner, np.arange(splits + 1))
    return cls(*(x.astype(np.int32) for x in (order, first, start, end, token, of_prefix)))


def _prefix_pieces(tables: PairTables, order: np.ndarray, splits: int) -> tuple[Any, ...]:
  """Returns the pieces of prefixes, whose splits have the numbers from `splits` on.

  Returns:
    The number of all splits, the split of each prefix, and of each piece its split, its first rank,
    the rank after its last, and its student token.
  """
  tokens = order[: np.sum(~tables.control_V)]
  length, of_prefix = tables.length_V[tokens], np.full(len(tables.phi_P), -1, np.int64)
  pieces = [[np.zeros(0, np.int64)] * 4]
  for r in range(1, int(length.max(initial=0))):
    rank = np.flatnonzero(length > r)
    at = tables.offset_V[tokens[rank]] + r
    begins, token = tables.longer_P[at], tables.phi_P[at].astype(np.int64)
    other = np.append(True, begins[1:] != begins[:-1])  # another prefix begins
    of_prefix[at] = owner = splits + np.cumsum(other) - 1
    splits += int(other.sum())
    first = np.flatnonzero(other | np.append(True, (token[1:] != token[:-1]) | (np.diff(rank) > 1)))
    last = np.append(first[1:], len(at)) - 1
    kept = token[first] >= 0
    some = (owner[first], rank[first], rank[last] + 1, token[first])
    pieces.append([x[kept] for x in some])
  return splits, of_prefix, *(np.concatenate(part) for part in zip(*pieces, strict=True))


@dataclasses.dataclass(frozen=True)
class Chains:
  """The levels of some student tokens; arrays are int32 [tokens, DEPTH].

  Attributes:
    place: Index of the teacher token that the level's distribution predicts; -1 after the last.
    real: Rank of that token.
    split: The split of the other tokens' mass; -1 for none.
    base: The student token of the mass outside the pieces; -1 for none.
    low: First rank of a range of tokens. At the first level, of the tokens that are possible; at
      further ones, of those that complete the student token, if no longer one matches.
    high: The rank after the last of the range.
    cut: True for chains that would continue after the last level, bool [tokens].
  """

  place: np.ndarray
  real: np.ndarray
  split: np.ndarray
  base: np.ndarray
  low: np.ndarray
  high: np.ndarray
  cut: np.ndarray


def chains(
  tables: PairTables, splits: Splits, aligned: Aligned, at: np.ndarray, known: np.ndarray
) -> Chains:
  """Returns the chains of some student tokens.

  Args:
    tables: The tables of the pair.
    splits: Its splits.
    aligned: The tokens of both.
    at: Indices of the student tokens; the teacher predicts the token in which each begins.
    known: True for the teacher tokens that the teacher predicts, bool.
  """
  n, last = len(at), len(known) - 1
  place, split, base = (np.full((n, DEPTH), -1, np.int32) for _ in range(3))
  real, low, high = (np.zeros((n, DEPTH), np.int32) for _ in range(3))
  rank_V = splits.rank_V
  mine, stop, offset = aligned.id_H[at], aligned.end_H[at], aligned.offset_H[at]
  i, g, state, mass_of = np.arange(n), aligned.g_H[at], np.full(n, -1), np.full(n, -1)
  for level in range(DEPTH):
    token, end = aligned.token_G[g], aligned.end_G[g]
    place[i, level], real[i, level] = g, rank_V[token]
    if level == 0:
      here, inside = tables.offset_V[token] + offset, offset > 0
      split[:, 0] = np.where(inside, splits.of_prefix[here], -1)
      low[:, 0] = np.where(inside, tables.longer_P[here], 0)
      high[:, 0] = np.where(inside, tables.high_P[here], tables.teacher.size)
      state = np.where(inside, -1, tables.state_V[token])
      mass_of, over = tables.phi_P[here].astype(np.int64), stop < end
    else:
      split[i, level], base[i, level] = state, mass_of
      low[i, level], high[i, level] = _completing(tables, aligned, g, stop[i])
      further, state = tables.look(state, token), tables.step(state, token)
      mass_of = np.where(further >= 0, further, mass_of)
      over = (stop[i] < end) | (stop[i] <= aligned.start_G[g])
    exact, after = stop[i] == end, np.minimum(g + 1, last)
    goes_on = ~over & (after > g) & (aligned.segment_G[after] == aligned.segment_G[g])
    goes_on &= known[after] & np.where(exact, state >= 0, stop[i] > end)
    mass_of = np.where(exact, mine[i], mass_of)
    i, g, state, mass_of = (x[goes_on] for x in (i, after, state, mass_of))
  cut = np.zeros(n, bool)
  cut[i] = True
  return Chains(place, real, split, base, low, high, cut)


def _completing(
  tables: PairTables, aligned: Aligned, g: np.ndarray, stop: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the ranges of ranks of the tokens that begin with the bytes of token g before `stop`.

  The ranges are empty where `stop` is not in token g.
  """
  token, taken = aligned.token_G[g], stop - aligned.start_G[g]
  length = tables.length_V[token]
  here, whole = (taken > 0) & (taken <= length), taken == length
  at = np.where(here & ~whole, tables.offset_V[token] + taken, 0)
  low = np.where(whole, tables.low_V[token], tables.low_P[at])
  high = np.where(whole, tables.high_V[token], tables.high_P[at])
  return np.where(here, low, 0), np.where(here, high, 0)
