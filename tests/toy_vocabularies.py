"""Toy vocabularies, and a dense projection by plain loops."""

from types import SimpleNamespace

import numpy as np

from distill_jax.cross_tokenizer.vocabulary import Vocabulary


class Toy(Vocabulary):
  """A vocabulary that spells a text with its longest pieces from the left.

  Args:
    pieces: The bytes of each id; None for a control token. All bytes of a text must be among them.
  """

  tokenizer = SimpleNamespace(begin=[])

  def __init__(self, *pieces):
    self.bytes_V = [*pieces]
    self.digest, self.size = repr(pieces), len(pieces)
    self.length_V = np.array([len(b or b"") for b in pieces], np.int32)
    self.control = frozenset(np.flatnonzero(self.length_V == 0).tolist())
    self.longest = int(self.length_V.max())
    self.id_of = {}
    for i, b in enumerate(pieces):
      if b:
        self.id_of.setdefault(b, i)

  def spell(self, ids):
    return b"".join(self.bytes_V[i] or b"" for i in ids)

  def encode_inner(self, text):
    data, ids = text.encode(), []
    while data:
      piece = next(data[:n] for n in range(self.longest, 0, -1) if data[:n] in self.id_of)
      ids.append(self.id_of[piece])
      data = data[len(piece) :]
    return ids

  def locate(self, text):
    ids = np.array(self.encode_inner(text), np.int64)
    return ids, np.append(0, np.cumsum(self.length_V[ids]))


class Reference:
  """The projection of dense distributions, float64, by loops over bytes.

  Args:
    teacher: A vocabulary.
    student: A vocabulary.
    roles: The student's control token of a teacher's one.
  """

  def __init__(self, teacher, student, roles):
    self.T, self.S, self.roles = teacher, student, roles
    self.first, self.steps, self.words = set(), set(), {}
    for data, u in student.id_of.items():
      try:
        ids = teacher.encode_inner(data.decode())
      except UnicodeDecodeError:
        continue
      for k in range(1, len(ids)):
        before = teacher.spell(ids[:k])
        self.words.setdefault(before, []).append((data, u))
        self.steps.add((teacher.spell(ids[: k - 1]), ids[k - 1]))
      if len(ids) > 1:
        self.first.add(ids[0])

  def phi(self, t, r):
    """The student token of teacher token t after r of its bytes, or None."""
    data = (self.T.bytes_V[t] or b"")[r:]
    if not data:
      return self.roles.get(t)
    if r == 0:
      try:
        return self.S.encode_inner(data.decode())[0]
      except (UnicodeDecodeError, StopIteration):
        pass
    pieces = [data[:n] for n in range(len(data), 0, -1) if data[:n] in self.S.id_of]
    return self.S.id_of[pieces[0]] if pieces else None

  def project(self, tokens, q, g, r, u):
    """The distribution of the student token u that begins r bytes inside of token g of a text.

    Args:
      tokens: The teacher's tokens of the text.
      q: The dense distribution of each of them.
      g: An index of a token.
      r: A number of bytes.
      u: The student's token in the text.

    Returns:
      The mass of each student token, and the mass that reaches none.
    """
    out, lost, t0 = np.zeros(self.S.size), 0.0, tokens[g]
    begun = (self.T.bytes_V[t0] or b"")[:r]
    fits = [
      t
      for t in range(self.T.size)
      if r == 0 or ((b := self.T.bytes_V[t] or b"").startswith(begun) and len(b) > r)
    ]
    scale = 1 / sum(q[g][t] for t in fits)
    for t in fits:
      if t != t0:
        v = self.phi(t, r)
        if v is None:
          lost += q[g][t] * scale
        else:
          out[v] += q[g][t] * scale
    base = self.phi(t0, r)
    state = self.T.bytes_V[t0] if r == 0 and t0 in self.first else None
    self._text(out, tokens, q, g, u, q[g][t0] * scale, (self.T.bytes_V[t0] or b"")[r:], state, base)
    return out, lost

  def _text(self, out, tokens, q, g, u, mass, spelt, state, base):
    """Gives out the mass of the token in the text, which ends after `spelt`."""
    word = self.S.bytes_V[u] or b""
    is_whole, is_over = len(word) == len(spelt), len(word) < len(spelt)
    if is_over or g + 1 == len(tokens) or (is_whole and state is None):
      out[u] += mass
      return
    g, base = g + 1, u if is_whole else base
    ends_here = len(spelt) < len(word) <= len(spelt + (self.T.bytes_V[tokens[g]] or b""))
    for t in range(self.T.size):
      if t != tokens[g]:
        v = self._word(state, t, word if ends_here else b"", spelt, u)
        out[base if v is None else v] += mass * q[g][t]
    t, m = tokens[g], mass * q[g][tokens[g]]
    if is_whole:
      out[u] += m  # the next student token begins here
      return
    further = self._word(state, t, b"", spelt, u)
    spelt = spelt + (self.T.bytes_V[t] or b"")
    state = spelt if state is not None and (state, t) in self.steps else None
    self._text(out, tokens, q, g, u, m, spelt, state, base if further is None else further)

  def _word(self, state, t, word, spelt, u):
    """The longest student token that the text before and token t make, or None."""
    data = self.T.bytes_V[t] or b""
    found = [(w, v) for w, v in self.words.get(state, []) if (state + data).startswith(w)]
    if word and (spelt + data).startswith(word):
      found.append((word, u))
    return max(found, key=lambda x: len(x[0]))[1] if found else None


def outcomes(q, n):
  """The systematic samples of n points of a distribution, with their probabilities.

  Counts are constant between the offsets at which a point crosses the end of an entry.
  """
  ends = np.cumsum(q)[:-1]
  cuts = np.unique(np.concatenate([[0.0, 1.0], n * ends - np.floor(n * ends)]))
  found = []
  for low, high in zip(cuts[:-1], cuts[1:], strict=True):
    points = (np.arange(n) + (low + high) / 2) / n
    ids = np.searchsorted(ends, points, "right")
    found.append((high - low, np.bincount(ids, minlength=len(q))))
  return found
