"""Tables of a teacher's and a student's vocabulary, for alignment and projection.

They depend on the two tokenizers alone, take 1 to 3 seconds to build, and 12 to 15 MB for
vocabularies of 50,000 and 128,000 tokens. In this package,

  V  tokens of the teacher's vocabulary
  P  bytes of all tokens of the teacher's vocabulary, one after another; a token without bytes
     has one place
  L  tokens of the teacher's vocabulary with bytes, in the order of their bytes

A student token w that the teacher spells with several tokens t1 .. tm opens a state for each of
t1 .. t1 + .. + t(m-1): there the teacher's next distribution tells how much of the mass goes to w.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.cross_tokenizer.vocabulary import Vocabulary


class PairTables:
  """The tables of a pair of tokenizers. They can be pickled.

  Args:
    teacher: The teacher's vocabulary.
    student: The student's vocabulary.
    roles: The student's token of each of the teacher's control tokens that has one.
    chats: What aligns a segment of chats, a `chats.ChatAligner`; None for other texts.

  Attributes:
    teacher: See Args.
    student: See Args.
    roles: See Args. With one tokenizer, every control token has its own role.
    chats: See Args.
    same: True if both have the same tokenizer, so that every token stays itself.
    length_V: int64, number of places of each teacher token: its bytes, or 1 without bytes.
    control_V: bool, True for teacher tokens without bytes.
    offset_V: int64, first place of each token among P.
    phi_P: int32, at offset_V[t] + r: the student token to which a teacher token t goes at a
      position that is r bytes inside of it, or -1 (see `_fill_phi`).
    phi_V: int32, phi_P at the beginning of each token.
    rank_V: int64, index of each token among L, len(L) for tokens without bytes.
    low_P: int64, at offset_V[t] + r, r > 0: the first rank of the tokens that begin with the first
      r bytes of t.
    longer_P: int64, likewise the first rank of those that are longer than r bytes.
    high_P: int64, likewise the rank after the last of them.
    low_V: int64, the first rank of the tokens that begin with all bytes of t, t included.
    high_V: int64, likewise the rank after the last of them.
    state_V: int64, the state after the token t at a token boundary, or -1.
    is_open_V: uint8, 1 where there is such a state.
  """

  def __init__(
    self,
    teacher: Vocabulary,
    student: Vocabulary,
    roles: Mapping[int, int],
    chats: Callable[[np.ndarray], Any] | None = None,
  ):
    self.teacher, self.student, self.roles = teacher, student, dict(roles)
    self.chats = chats
    self.same = teacher.digest == student.digest
    spelt = [b or b"" for b in teacher.bytes_V]
    self.control_V = teacher.length_V == 0
    self.length_V = np.maximum(teacher.length_V, 1).astype(np.int64)
    self.offset_V = np.cumsum(self.length_V) - self.length_V
    self.phi_P = np.full(int(self.length_V.sum()), -1, np.int32)
    if self.same:
      self.roles = {t: t for t in np.flatnonzero(self.control_V).tolist()}
      self.phi_P[self.offset_V] = np.arange(teacher.size)
    else:
      self._fill_phi(spelt)
    self.phi_V = self.phi_P[self.offset_V]
    by_bytes = sorted((b, t) for t, b in enumerate(spelt) if b)
    self._sorted = [b for b, _ in by_bytes]
    self.rank_V = np.full(teacher.size, len(by_bytes), np.int64)
    self.rank_V[[t for _, t in by_bytes]] = np.arange(len(by_bytes))
    self._find_ranges(spelt)
    self.state_V = np.full(teacher.size, -1, np.int64)
    self._states = _States(self, [] if self.same else spanning_words(teacher, student))
    self.is_open_V = (self.state_V >= 0).astype(np.uint8)

  def overlap(self) -> tuple[float, float]:
    """Returns the shares of the student's and of the teacher's tokens with bytes that both have."""
    ours, theirs = self.student.id_of, self.teacher.id_of
    both = len(ours.keys() & theirs.keys())
    return both / max(len(ours), 1), both / max(len(theirs), 1)

  def look(self, state: np.ndarray, token: np.ndarray) -> np.ndarray:
    """Returns the student tokens that reach beyond a state's bytes when a teacher token follows.

    Args:
      state: int64 [n], states, or -1.
      token: int64 [n], the teacher tokens that follow.

    Returns:
      int64 [n], the longest student token that consists of the state's bytes and bytes of the token
      that follows, or -1.
    """
    return self._states.look(state, self.rank_V[token])

  def step(self, state: np.ndarray, token: np.ndarray) -> np.ndarray:
    """Returns the states after a teacher token that follows a state, or -1."""
    return self._states.step(state, token)

  def state_pieces(self) -> tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the number of states, and what `look` knows of them as ranges of ranks.

    The ranges are those of (state, first rank, the rank after the last, student token), int64.
    """
    return self._states.pieces()

  def range_of(self, prefix: bytes) -> tuple[int, int]:
    """Returns the range [low, high) of ranks of the tokens that begin with some bytes."""
    low = bisect.bisect_left(self._sorted, prefix)
    shorter = prefix.rstrip(b"\xff")
    if not shorter:
      return low, len(self._sorted)
    return low, bisect.bisect_left(self._sorted, shorter[:-1] + bytes([shorter[-1] + 1]), lo=low)

  def _fill_phi(self, spelt: Sequence[bytes]) -> None:
    """Fills in phi_P (the map phi of BPM, arXiv 2607.22334).

    At the beginning of a teacher token it is the first token of the student's own tokenisation of
    the token's text. Elsewhere, or if the token is not a text, it is the longest student token that
    is a prefix of the rest of its bytes.
    """
    id_of, longest = self.student.id_of, self.student.longest
    first: dict[bytes, int] = {}
    for b, at in zip(spelt, self.offset_V.tolist(), strict=True):
      for r in range(len(b)):
        rest = b[r:]
        if (u := first.get(rest)) is None:
          ids = (id_of.get(rest[:n], -1) for n in range(min(len(rest), longest), 0, -1))
          u = first[rest] = next((i for i in ids if i >= 0), -1)
        self.phi_P[at + r] = u
      if b and (u := _first_token(self.student, b)) is not None:
        self.phi_P[at] = u
    for t, u in self.roles.items():
      self.phi_P[self.offset_V[t]] = u

  def _find_ranges(self, spelt: Sequence[bytes]) -> None:
    places = len(self.phi_P)
    self.low_P, self.longer_P, self.high_P = (np.zeros(places, np.int64) for _ in range(3))
    self.low_V, self.high_V = (np.zeros(len(spelt), np.int64) for _ in range(2))
    found: dict[bytes, tuple[int, int]] = {}
    for t, (b, at) in enumerate(zip(spelt, self.offset_V.tolist(), strict=True)):
      if not b:
        continue
      for r in range(1, len(b) + 1):
        prefix = b[:r]
        if (ranks := found.get(prefix)) is None:
          ranks = found[prefix] = self.range_of(prefix)
        low, high = ranks
        if r == len(b):
          self.low_V[t], self.high_V[t] = low, high
        else:
          self.low_P[at + r], self.high_P[at + r] = low, high
          while low < high and self._sorted[low] == prefix:
            low += 1
          self.longer_P[at + r] = low


def _first_token(student: Vocabulary, data: bytes) -> int | None:
  """Returns the first token of the student's tokenisation of a text; None if it is not a text."""
  try:
    ids = student.encode_inner(data.decode())
  except UnicodeDecodeError:
    return None
  return ids[0] if ids and student.spell(ids) == data else None


def spanning_words(teacher: Vocabulary, student: Vocabulary) -> list[tuple[int, list[int]]]:
  """Returns the student tokens that the teacher spells with several tokens, and these tokens."""
  words = []
  for data, u in student.id_of.items():
    if len(data) < 2:
      continue
    try:
      ids = teacher.encode_inner(data.decode())
    except UnicodeDecodeError:
      continue
    if len(ids) > 1 and teacher.spell(ids) == data:
      words.append((u, ids))
  return words


class _States:
  """The states, as sorted keys: (state, rank) for `look`, and (state, token) for `step`."""

  def __init__(self, tables: PairTables, words: Sequence[tuple[int, list[int]]]):
    self._ranks, self._tokens = len(tables._sorted) + 1, tables.teacher.size
    index: dict[bytes, int] = {}
    rests: list[list[tuple[bytes, int]]] = []  # by state: bytes that are missing from a word
    steps: dict[int, int] = {}
    for u, ids in words:
      data, at, before = tables.student.bytes_V[u], 0, -1
      assert data is not None
      for t in ids[:-1]:
        at += int(tables.length_V[t])
        state = index.setdefault(data[:at], len(rests))
        if state == len(rests):
          rests.append([])
        rests[state].append((data[at:], u))
        if before < 0:
          tables.state_V[t] = state
        else:
          steps[before * self._tokens + t] = state
        before = state
    self._look_keys, self._look_words = self._intervals(tables, rests)
    self._step_keys = np.array(sorted(steps), np.int64)
    self._step_states = np.array([steps[k] for k in sorted(steps)], np.int64)
    self._find_extent()

  def _intervals(
    self, tables: PairTables, rests: Sequence[Sequence[tuple[bytes, int]]]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the keys (state, rank) at which the longest word changes, ascending, and the words.

    The tokens that begin with the rest of a word are an interval of ranks. Intervals of one state
    are nested or disjoint, so a stack holds those that are open.
    """
    words: dict[int, int] = {}  # of equal keys, the last one counts
    for state, some in enumerate(rests):
      base = state * self._ranks
      words[base] = -1
      # Of equal intervals, the last one has the longest word.
      spans = [(*tables.range_of(rest), u) for rest, u in sorted(some, key=lambda s: len(s[0]))]
      spans = sorted((s for s in spans if s[0] < s[1]), key=lambda s: (s[0], -s[1]))
      open_: list[tuple[int, int]] = []  # (end, word), the innermost last
      for low, high, u in [*spans, (self._ranks, 0, -1)]:
        while open_ and open_[-1][0] <= low:
          end, _ = open_.pop()
          words[base + end] = open_[-1][1] if open_ else -1
        if u >= 0:
          words[base + low] = u
          open_.append((high, u))
    keys = sorted(words)
    return np.array(keys, np.int64), np.array([words[k] for k in keys], np.int64)

  def pieces(self) -> tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    state, first = np.divmod(self._look_keys, self._ranks)
    past = np.append(first[1:], 0)  # the last key of a state has no word
    has_word = self._look_words >= 0
    states, words = int(state.max(initial=-1)) + 1, self._look_words[has_word]
    return states, state[has_word], first[has_word], past[has_word], words

  def _find_extent(self) -> None:
    """Finds, by state, the range of ranks with a word, and whether there are steps.

    Most of the tokens that are looked up are outside of it. The last entry is for the state -1.
    """
    state, rank = np.divmod(self._look_keys, self._ranks)
    states = int(state.max(initial=-1)) + 1
    self._low, self._high = np.zeros(states + 1, np.int64), np.zeros(states + 1, np.int64)
    with_word = np.flatnonzero(self._look_words >= 0)[::-1]
    self._low[state[with_word]] = rank[with_word]  # the first of a state is written last
    self._high[state] = rank
    self._has_steps = np.zeros(states + 1, bool)
    self._has_steps[self._step_keys // self._tokens] = True

  def look(self, state: np.ndarray, rank: np.ndarray) -> np.ndarray:
    out = np.full(len(state), -1, np.int64)
    near = np.flatnonzero((rank >= self._low[state]) & (rank < self._high[state]))
    key = state[near] * self._ranks + rank[near]
    out[near] = self._look_words[np.searchsorted(self._look_keys, key, "right") - 1]
    return out

  def step(self, state: np.ndarray, token: np.ndarray) -> np.ndarray:
    out = np.full(len(state), -1, np.int64)
    some = np.flatnonzero(self._has_steps[state])
    key = state[some] * self._tokens + token[some]
    at = np.minimum(np.searchsorted(self._step_keys, key), len(self._step_keys) - 1)
    out[some] = np.where(self._step_keys[at] == key, self._step_states[at], -1)
    return out
