"""Projection of sampled distributions over the teacher's tokens to the student's tokens.

The distribution of a student token that begins r bytes inside of teacher token g is computed from
the teacher's distribution of g (BPM, arXiv 2607.22334, for samples):

  r = 0  A token t other than the one in the text gives its mass to phi(t). The token in the text
         gives all to the student token u in the text if u ends inside of it. Otherwise the
         distribution of g + 1 tells how its mass is split between u, longer student tokens, and phi
         of it, and so on until u and all longer words that the text could have begun are over.
  r > 0  The same for the tokens that begin with the r bytes and are longer, divided by their
         mass D.

The counts of all distributions are systematic samples with independent offsets, so a product of
counts of different ones is unbiased, and so is the projection for r = 0. It also sums to 1, and
where the next distribution is not read, it consists of whole counts. For r > 0, it is a ratio: the
token in the text enters both sums with its exact probability, so no position is without a sample,
and the bias, O(1/N), is a tenth of that of counts. (With exact probabilities for r = 0 the sum
would not be 1, or the result biased if the others are scaled; measured at N = 63, neither is closer
to the exact gradient, and both have to be drawn anew.)

In this module, X are the student tokens that are projected, E are entries; see also align.py.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from distill_jax.cross_tokenizer.align import Aligned
from distill_jax.cross_tokenizer.tables import PairTables
from distill_jax.cross_tokenizer.weights import POINT, entries_of, group


@dataclasses.dataclass(frozen=True)
class TeacherRows:
  """The distributions of the teacher's tokens, by the index g of the token in the text.

  Attributes:
    n: Number of sampled points of each.
    id_E: int32, ids of the sampled tokens, distinct within a distribution.
    count_E: int32, their counts.
    start_G: int64, index of the first entry of each token's distribution.
    end_G: int64, index after the last entry; equal to start_G where there is no distribution.
    logp_G: float64, the exact log-probability of the token in the text.
  """

  n: int
  id_E: np.ndarray
  count_E: np.ndarray
  start_G: np.ndarray
  end_G: np.ndarray
  logp_G: np.ndarray

  def entries(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the entries of some tokens: their ids, counts, and the number of them per token."""
    at, size = entries_of(self.start_G[g], self.end_G[g])
    return self.id_E[at], self.count_E[at], size


class Projected(NamedTuple):
  """The distributions of some student tokens.

  Attributes:
    start_X: int64 [X + 1], index of the first entry of each, and the number of entries.
    id_E: int64, ids of the student's tokens, ascending within a distribution.
    weight_E: int64, their weights in units of POINT; a distribution that lost no mass has n.
    is_whole_X: bool, True where all weights are whole counts and none is lost.
    label_logp_X: float64, the log-probability of the token in the text, from exact probabilities of
      the teacher's tokens in the text.
    mass_X: float64, the mass D of the teacher's tokens that begin with the bytes before; 1 at
      token boundaries.
    lost_X: float64, the mass that reaches no student token.
    unresolved_X: float64, the mass of teacher tokens that are not in the text and that a longer
      student token could have begun with. Their next distribution is not known, so phi gets it.
    opened_X: float64, the mass of the token in the text if the next distribution is read.
    beyond_X: float64, what student tokens that end after it get of that.
    hard_X: bool, True where the distribution is the token in the text, because mass_X is below the
      limit, or because no mass reaches a student token.
  """

  start_X: np.ndarray
  id_E: np.ndarray
  weight_E: np.ndarray
  is_whole_X: np.ndarray
  label_logp_X: np.ndarray
  mass_X: np.ndarray
  lost_X: np.ndarray
  unresolved_X: np.ndarray
  opened_X: np.ndarray
  beyond_X: np.ndarray
  hard_X: np.ndarray


class _Paths(NamedTuple):
  """Rows that need further distributions of the teacher, one after another.

  Attributes:
    x: int64, index of the student token.
    g: int64, index of the teacher token whose distribution is read next.
    mass: float64, the mass of the text before g, from counts.
    logp: float64, the logarithm of that mass, from exact probabilities.
    state: int64, the state of the text before g (see tables.py), or -1.
    base: int64, the student token of what ends here: u if u is over, otherwise the longest before.
  """

  x: np.ndarray
  g: np.ndarray
  mass: np.ndarray
  logp: np.ndarray
  state: np.ndarray
  base: np.ndarray


def project(
  tables: PairTables, aligned: Aligned, rows: TeacherRows, h: np.ndarray, min_mass: float
) -> Projected:
  """Returns the distributions of some student tokens.

  Args:
    tables: The tables of both tokenizers.
    aligned: The tokens of both.
    rows: The teacher's distributions.
    h: int64 [X], indices of student tokens whose teacher token has a distribution.
    min_mass: Limit of the mass D, below which the distribution is the token in the text.
  """
  return _Projection(tables, aligned, rows, h).run(min_mass)


class _Projection:
  """The projection of some student tokens; see `project`."""

  def __init__(self, tables: PairTables, aligned: Aligned, rows: TeacherRows, h: np.ndarray):
    self.tables, self.aligned, self.rows = tables, aligned, rows
    self.whole = rows.n * POINT
    self.g, self.offset = aligned.g_H[h], aligned.offset_H[h]
    self.u, self.end = aligned.id_H[h], aligned.end_H[h]
    X = len(h)
    self.mass, self.lost, self.unresolved = np.ones(X), np.zeros(X), np.zeros(X)
    self.opened, self.beyond = np.zeros(X), np.zeros(X)
    self.others = np.zeros(X)  # the label's mass that does not come from the token in the text
    self.logp = rows.logp_G[self.g].copy()  # that which does
    self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # x, id, weight

  def run(self, min_mass: float) -> Projected:
    X, vocab_size = len(self.g), self.tables.student.size
    whole, at_boundaries = self._at_boundaries(np.flatnonzero(self.offset == 0))
    inside = self._inside(np.flatnonzero(self.offset > 0))
    paths = _Paths(*map(np.concatenate, zip(at_boundaries, inside, strict=True)))
    while len(paths.x):
      paths = self._next(paths)
    whole = self._drop_lost(*whole, 1 / self.rows.n)
    x, u, weight = map(np.concatenate, zip(*self.parts, strict=True))
    parts = self._drop_lost(x, u, weight, 1 / self.whole)
    parts, hard = self._with_hard_labels(parts, min_mass)
    is_whole = self.lost == 0
    is_whole[parts[0]] = False
    is_whole[hard] = True
    with np.errstate(divide="ignore"):
      label_logp = np.minimum(np.logaddexp(self.logp, np.log(self.others)), 0)
    return Projected(
      *group(whole, parts, X, vocab_size),
      is_whole,
      label_logp,
      self.mass,
      self.lost,
      self.unresolved,
      self.opened,
      self.beyond,
      hard,
    )

  def _at_boundaries(
    self, x: np.ndarray
  ) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], _Paths]:
    """Projects rows at boundaries of teacher tokens.

    Returns:
      The entries with whole counts (x, id, count), and the rows that need further distributions.
    """
    token = self.aligned.token_G[self.g[x]]
    t, count, size = self.rows.entries(self.g[x])
    if not len(x):
      return (x, t, count), self._begin(x, np.zeros(0), x)
    of = np.repeat(x, size)
    label_E = np.repeat(token.astype(t.dtype), size)  # the token in the text
    hit = np.flatnonzero(t == label_E)
    row = np.searchsorted(x, of[hit])
    u = self.tables.phi_V[t]
    to_label = np.flatnonzero(u == np.repeat(self.u[x].astype(u.dtype), size))
    to_label = to_label[t[to_label] != label_E[to_label]]
    self.others += self._sum(of[to_label], count[to_label] / self.rows.n)
    u[hit] = self.u[of[hit]]
    label = np.zeros(len(x))
    label[row] = count[hit] / self.rows.n

    state = self.tables.state_V[token]
    is_open = self.tables.is_open_V[t] * count
    is_open[hit] = 0
    self.unresolved[x] = np.add.reduceat(is_open, np.cumsum(size) - size) / self.rows.n
    goes = self._needs_next(x, self.g[x], state)
    count[hit[goes[row]]] = 0  # these go to the next distribution
    return (of, u, count), self._begin(x[goes], label[goes], state[goes])

  def _inside(self, x: np.ndarray) -> _Paths:
    """Projects rows inside of teacher tokens; returns those whose next distributions are needed."""
    tables, g, r = self.tables, self.g[x], self.offset[x]
    token = self.aligned.token_G[g]
    t, count, size = self.rows.entries(g)
    owner = np.repeat(np.arange(len(g)), size)
    place, rank = tables.offset_V[token] + r, tables.rank_V[t]
    is_longer = (rank >= tables.longer_P[place][owner]) & (rank < tables.high_P[place][owner])
    keep = np.flatnonzero(is_longer & (t != token[owner]))
    owner, t, share = owner[keep], t[keep], count[keep] / self.rows.n
    p = np.exp(self.rows.logp_G[g])
    self.mass[x] = np.maximum(p + np.bincount(owner, share, len(x)), 1e-300)
    share = share / self.mass[x][owner]
    u = tables.phi_P[tables.offset_V[t] + r[owner]].astype(np.int64)
    self._add_others(x[owner], u, share)
    self._emit(x[owner], u, share)
    self.logp[x] -= np.log(self.mass[x])
    none = np.full(len(x), -1)
    goes = self._needs_next(x, g, none)
    over = x[~goes]
    self._emit(over, self.u[over], p[~goes] / self.mass[over])
    return self._begin(x[goes], (p / self.mass[x])[goes], none[goes])

  def _drop_lost(
    self, x: np.ndarray, u: np.ndarray, weight: np.ndarray, unit: float
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns entries without those that reach no student token, which are counted."""
    lost = np.flatnonzero(u < 0)
    if len(lost):
      self.lost += self._sum(x[lost], weight[lost] * unit)
      x, u, weight = (np.delete(a, lost) for a in (x, u, weight))
    return x, u, weight

  def _with_hard_labels(
    self, parts: tuple[np.ndarray, np.ndarray, np.ndarray], min_mass: float
  ) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """Returns parts in which rows with little mass are the label, and True for these rows."""
    x, u, weight = parts
    hard = (self.mass < min_mass) | (self.lost > 1 - 0.5 / self.rows.n)
    some = np.flatnonzero(hard)
    keep = ~hard[x]
    x, u = np.append(x[keep], some), np.append(u[keep], self.u[some])
    return (x, u, np.append(weight[keep], np.full(len(some), self.whole))), hard

  def _next(self, paths: _Paths) -> _Paths:
    """Reads the next distribution of rows; returns those that need another."""
    aligned, tables = self.aligned, self.tables
    x, g = paths.x, paths.g
    t, count, size = self.rows.entries(g)
    owner = np.repeat(np.arange(len(x)), size)
    is_label = t == aligned.token_G[g][owner]
    share = count / self.rows.n
    label = np.zeros(len(x))
    label[owner[is_label]] = share[is_label]
    owner, t, share = owner[~is_label], t[~is_label], share[~is_label]
    word = self._words(paths, owner, t)
    u = np.where(word >= 0, word, paths.base[owner])
    of = x[owner]
    self._emit(of, u, share * paths.mass[owner])
    self._add_others(of, u, share * np.exp(paths.logp)[owner])
    longer, open_ = word >= 0, tables.step(paths.state[owner], t) >= 0
    self.beyond += self._sum(of[longer], (share * paths.mass[owner])[longer])
    self.unresolved += self._sum(of[open_], (share * paths.mass[owner])[open_])

    mass, logp = paths.mass * label, paths.logp + self.rows.logp_G[g]
    token, end, is_over = aligned.token_G[g], aligned.end_G[g], self.end[x] <= aligned.end_G[g - 1]
    state = tables.step(paths.state, token)
    further = tables.look(paths.state, token)
    base = np.where(further >= 0, further, paths.base)
    goes = ~is_over & self._needs_next(x, g, state)
    last = ~goes
    self._emit(x[last], self.u[x[last]], mass[last])
    self.logp[x[last]] = logp[last]
    longer = last & (self.end[x] > aligned.end_G[self.g[x]])
    self.beyond += self._sum(x[longer], mass[longer])
    base = np.where(self.end[x] == end, self.u[x], base)
    return _Paths(*(a[goes] for a in (x, g + 1, mass, logp, state, base)))

  def _words(self, paths: _Paths, owner: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Returns the student token that the text before and a teacher token t make, or -1.

    It is the longest word of the state that they spell, or u if they spell u and u is longer.
    """
    aligned, tables = self.aligned, self.tables
    word = tables.look(paths.state[owner], t)
    g, end = paths.g, self.end[paths.x]
    crosses = (end > aligned.end_G[g - 1]) & (end <= aligned.end_G[g])
    if not crosses.any():
      return word
    token, is_whole = aligned.token_G[g], end == aligned.end_G[g]
    place = np.where(crosses & ~is_whole, tables.offset_V[token] + end - aligned.start_G[g], 0)
    low = np.where(is_whole, tables.low_V[token], tables.low_P[place])
    high = np.where(is_whole, tables.high_V[token], tables.high_P[place])
    rank, u = tables.rank_V[t], self.u[paths.x][owner]
    spells_u = crosses[owner] & (rank >= low[owner]) & (rank < high[owner])
    length_U = tables.student.length_V
    is_longer = (word < 0) | (length_U[np.maximum(word, 0)] < length_U[u])
    return np.where(spells_u & is_longer, u, word)

  def _needs_next(self, x: np.ndarray, g: np.ndarray, state: np.ndarray) -> np.ndarray:
    """Returns True where u or a word may continue after g, and the next distribution is there."""
    aligned, rows = self.aligned, self.rows
    after = np.minimum(g + 1, len(aligned.token_G) - 1)
    is_there = (aligned.segment_G[after] == aligned.segment_G[g]) & (after > g)
    is_there &= rows.end_G[after] > rows.start_G[after]
    end, teacher_end = self.end[x], aligned.end_G[g]
    return is_there & ((end > teacher_end) | ((end == teacher_end) & (state >= 0)))

  def _begin(self, x: np.ndarray, mass: np.ndarray, state: np.ndarray) -> _Paths:
    self.opened[x] = mass
    g = self.g[x]
    phi = self.tables.phi_P[self.tables.offset_V[self.aligned.token_G[g]] + self.offset[x]]
    base = np.where(self.end[x] == self.aligned.end_G[g], self.u[x], phi)
    return _Paths(x, g + 1, mass, self.logp[x], state, base)

  def _emit(self, x: np.ndarray, u: np.ndarray, mass: np.ndarray) -> None:
    self.parts.append((x, u, np.rint(mass * self.whole).astype(np.int64)))

  def _add_others(self, x: np.ndarray, u: np.ndarray, mass: np.ndarray) -> None:
    """Adds the mass of other tokens that go to u, the label."""
    hit = np.flatnonzero(u == self.u[x])
    self.others += self._sum(x[hit], mass[hit])

  def _sum(self, x: np.ndarray, mass: np.ndarray) -> np.ndarray:
    return np.bincount(x, mass, len(self.g))
