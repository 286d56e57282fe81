"""Two tiny tokenizers over the same bytes, and what a projection is by enumeration, in float64."""

import functools
import json

import numpy as np
import tiny

from distill_jax.cross_tokenizer.roles import match_roles
from distill_jax.cross_tokenizer.tables import PairTables
from distill_jax.cross_tokenizer.vocabulary import Vocabulary
from distill_jax.data.tokenizers import Tokenizer

LETTERS = "ab "
# Merges of both tokenizers. The student's aba, abab and "  " span several of the teacher's tokens,
# and the teacher's baa and " ba" contain several of the student's.
TEACHER = ("b a", "a b", "ba a", "Ġ ba", "a a")
STUDENT = ("a b", "ab a", "ab ab", "Ġ Ġ", "b b", "aba b")


def raw(merges, letters=LETTERS) -> bytes:
  """A byte-level tokenizer.json of some letters and merges, with an EOS."""
  spelt = [a.replace(" ", "Ġ") for a in letters] + [m.replace(" ", "") for m in merges]
  vocab = {token: i for i, token in enumerate(dict.fromkeys(spelt))}
  eos = {"id": len(vocab), "content": "<|endoftext|>", "special": True}
  eos |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
  byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
  return json.dumps(
    {
      "version": "1.0",
      "added_tokens": [eos],
      "normalizer": None,
      "pre_tokenizer": byte_level | {"use_regex": False},
      "post_processor": None,
      "decoder": byte_level | {"use_regex": False},
      "model": {"type": "BPE", "vocab": vocab, "merges": list(merges)},
    }
  ).encode()


def vocabulary(merges, letters=LETTERS) -> Vocabulary:
  return Vocabulary(Tokenizer(raw(merges, letters), "tiny", None, None))


@functools.cache
def tables(teacher=TEACHER, student=STUDENT) -> PairTables:
  teacher, student = vocabulary(teacher), vocabulary(student)
  return PairTables(teacher, student, match_roles(teacher, student, {}))


def teacher_config(folder, characters: int):
  """A config of a random teacher and a random text of LETTERS, with both tokenizers in `folder`."""
  c = tiny.tiny(folder)
  rng = np.random.default_rng(0)
  (folder / "text.txt").write_text("".join(rng.choice([*LETTERS], characters)))
  for name, merges in (("teacher", TEACHER), ("student", STUDENT)):
    (folder / f"{name}.json").write_bytes(raw(merges))
  c.teacher.source = ""
  c.data.tokenizer = str(folder / "teacher.json")
  c.data.sequences = 8
  return c


def sampled_text(i, length):
  """Row i of a round: random tokens of the student. Those of an odd number end."""
  rng, student = np.random.default_rng(i), tables().student
  t, prompt, n = np.arange(length), 3 + i % 2, 12 + i
  tokens = np.where(t < n, rng.choice(np.flatnonzero(student.length_V), length), 0)
  if i % 2:
    tokens[n - 1] = student.end
  logp, reward = -rng.gamma(1, 2, length), np.full(length, i % 3 == 0)
  return {
    "tokens_T": tokens.astype(np.int32),
    "segments_T": (t < n).astype(np.int32),
    "mask_T": (t >= prompt - 1) & (t < n - 1),
    "behaviour_logp_T": logp.astype(np.float32),
    "reward_T": reward.astype(np.float32),
  }


class Enumeration:
  """The projection as the design defines it, token by token, without tables."""

  def __init__(self, pair, aligned, p_GV, known):
    self.T, self.S, self.roles = pair.teacher, pair.student, pair.roles
    self.aligned, self.p_GV, self.known = aligned, p_GV, known
    self.words = {}  # student token: the teacher's spelling of it
    for b, u in self.S.id_of.items():
      ids = self.T.encode_inner(b.decode())
      if pair.same or len(ids) < 2:
        continue
      self.words[u] = ids

  def phi(self, t, r):
    if t in self.roles:
      return self.roles[t]
    rest = (self.T.bytes_V[t] or b"")[r:]
    if r == 0 and rest:
      return self.S.encode_inner(rest.decode())[0]
    found = (self.S.id_of.get(rest[:n], -1) for n in range(len(rest), 0, -1))
    return next((u for u in found if u >= 0), -1)

  def target(self, h):
    """(distribution [S], mass D, mass that is lost) of a student token."""
    a, out_S, lost = self.aligned, np.zeros(self.S.size), 0.0
    g, r, u, stop = a.g_H[h], a.offset_H[h], a.id_H[h], a.end_H[h]
    spell = lambda t: self.T.bytes_V[t] or b""
    prefix = spell(a.token_G[g])[:r]
    possible = [
      t for t in range(self.T.size) if not r or (spell(t)[:r] == prefix and len(spell(t)) > r)
    ]
    mass = self.p_GV[g][possible].sum()
    chain, left, base = [], 1 / mass if r else 1.0, None
    while True:
      real, begin = a.token_G[g], a.start_G[g]
      for t in possible if not chain else range(self.T.size):
        if t == real:
          continue
        if not chain:
          to = self.phi(t, r)
        else:
          fits = [w for w in self.open(chain, r) if spell(t).startswith(self.rest(w, chain))]
          if begin < stop <= a.end_G[g] and spell(t).startswith(spell(real)[: stop - begin]):
            fits.append(u)
          to = max(fits, key=lambda w: len(self.S.bytes_V[w]), default=base)
        if to < 0:
          lost += left * self.p_GV[g][t]
        else:
          out_S[to] += left * self.p_GV[g][t]
      left *= self.p_GV[g][real]
      if chain:
        over = stop <= begin or stop < a.end_G[g]
        further = [w for w in self.open(chain, r) if spell(real).startswith(self.rest(w, chain))]
        base = max(further, key=lambda w: len(self.S.bytes_V[w]), default=base)
      else:
        over, base = stop < a.end_G[g], self.phi(real, r)
      chain.append(real)
      reads = stop > a.end_G[g] or (stop == a.end_G[g] and self.open(chain, r))
      known = g + 1 < len(self.known) and self.known[g + 1]
      if over or not reads or not known or a.segment_G[g + 1] != a.segment_G[g]:
        break
      base = u if stop == a.end_G[g] else base
      g += 1
    out_S[u] += left
    return out_S / out_S.sum(), mass if r else 1.0, lost

  def open(self, chain, r):
    """The student tokens that the teacher spells with the chain and further tokens."""
    n = len(chain)
    return [] if r else [w for w, ids in self.words.items() if ids[:n] == chain and len(ids) > n]

  def rest(self, w, chain):
    return self.S.bytes_V[w][len(self.T.spell(chain)) :]
