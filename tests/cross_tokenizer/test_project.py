"""The projection equals that of dense distributions: exactly, or in the mean over all samples."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_vocabularies import Reference, Toy, outcomes

from distill_jax.cross_tokenizer.align import KINDS, align
from distill_jax.cross_tokenizer.project import TeacherRows, project
from distill_jax.cross_tokenizer.tables import PairTables
from distill_jax.cross_tokenizer.weights import POINT, resample

LETTERS = (b"a", b"b", b"c", b" ")
TEACHER = Toy(None, *LETTERS, b"ab", b"bc", b"ca", b" a", None)
# Longer and shorter than the teacher's, across its boundaries, and over up to four of its tokens.
STUDENT = Toy(*LETTERS, b"abc", b"b ", b" ab", b"cab", b"ca ca", b"aaaa", None)
ROLES = {0: 10}
TEXTS = ("abca", "ca ca", "aaaab", "b abc", "bcaa", "aab ")


def teacher_rows(n, tokens, counts, q):
  """Distributions by token, of counts [tokens, V] and exact probabilities; none for the first."""
  counts = np.array(counts)
  counts[0] = 0
  at = np.nonzero(counts)
  ends = np.cumsum((counts > 0).sum(1))
  logp = np.log(q[np.arange(len(tokens)), tokens])
  return TeacherRows(n, at[1].astype(np.int32), counts[at], np.append(0, ends[:-1]), ends, logp)


def dense(p, size):
  """Projected distributions as an array [X, size]."""
  out = np.zeros((len(p.start_X) - 1, size))
  owner = np.repeat(np.arange(len(out)), np.diff(p.start_X))
  out[owner, p.id_E] = p.weight_E
  return out


def taught(aligned):
  """The student tokens whose teacher token is not the first of its segment."""
  first = np.searchsorted(aligned.segment_G, aligned.segment_G)
  return np.flatnonzero(aligned.g_H > first[aligned.g_H])


def distributions(rng, tokens, size):
  q = rng.dirichlet(np.full(size, 0.6), len(tokens))
  return 0.9 * q + 0.1 / size  # no log of 0


def expected(reference, aligned, q, h):
  """The reference's distributions of some student tokens of one segment, and the lost mass."""
  tokens = aligned.token_G.tolist()
  places = zip(aligned.g_H[h], aligned.offset_H[h], aligned.id_H[h], strict=True)
  rows = [reference.project(tokens, q, int(g), int(r), int(u)) for g, r, u in places]
  return np.array([row for row, _ in rows]), np.array([lost for _, lost in rows])


@pytest.mark.parametrize("text", TEXTS)
def test_the_mean_over_all_samples_is_the_dense_projection(text):
  """Exact, within and spanning rows, over up to four distributions: unbiased to rounding."""
  n, rng = 3, np.random.default_rng(len(text))
  tables, reference = PairTables(TEACHER, STUDENT, ROLES), Reference(TEACHER, STUDENT, ROLES)
  tokens = np.array([1, *TEACHER.encode_inner(text)])[:5]
  q = distributions(rng, tokens, TEACHER.size)
  samples = [outcomes(row, n) for row in q[1:]]
  choices = [*itertools.product(*samples)]
  chance = np.array([np.prod([p for p, _ in c]) for c in choices])
  np.testing.assert_allclose(chance.sum(), 1, rtol=1e-12)
  aligned, skipped = align(tables, [tokens] * len(choices))
  assert not skipped
  counts = [row for c in choices for row in (np.zeros(TEACHER.size, int), *(x for _, x in c))]
  rows = teacher_rows(n, np.tile(tokens, len(choices)), counts, np.tile(q, (len(choices), 1)))
  h = taught(aligned)
  projected = project(tables, aligned, rows, h, 0.0)
  one, _ = align(tables, [tokens])
  some = taught(one)
  got = dense(projected, STUDENT.size).reshape(len(choices), len(some), -1) / (n * POINT)
  mean = np.einsum("c,cxv->xv", chance, got)
  lost = chance @ projected.lost_X.reshape(len(choices), -1)
  want, want_lost = expected(reference, one, q, some)
  linear = one.offset_H[some] == 0
  assert linear.any()
  np.testing.assert_allclose(mean[linear], want[linear], atol=1e-12)
  np.testing.assert_allclose(lost[linear], want_lost[linear], atol=1e-12)


def test_the_texts_have_all_kinds_and_depths():
  tables, kinds, ends = PairTables(TEACHER, STUDENT, ROLES), set(), set()
  for text in TEXTS:
    aligned, _ = align(tables, [np.array([1, *TEACHER.encode_inner(text)])])
    h = taught(aligned)
    kinds |= {KINDS[k] for k in aligned.kind_of(h)}
    last = np.searchsorted(aligned.end_G, aligned.end_H[h])
    ends |= set((last - aligned.g_H[h]).tolist())
  assert kinds == set(KINDS) and ends >= {0, 1, 2}


def pieces_of(alphabet):
  """Random vocabularies over some bytes, which have each of them as a piece."""
  piece = st.binary(min_size=2, max_size=4).map(
    lambda b: bytes(alphabet[x % len(alphabet)] for x in b)
  )
  singles = [bytes([x]) for x in alphabet]
  return st.lists(piece, max_size=6, unique=True).map(lambda p: Toy(*singles, *p, None))


# One letter, and the two bytes of "é": pieces and segments may be cut inside of it.
ALPHABET = b"a\xc3\xa9"


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.data())
def test_random_vocabularies_with_whole_counts_equal_the_dense_projection(data):
  """Samples without error, because all probabilities are multiples of 1/N: every kind of row."""
  teacher, student = data.draw(pieces_of(ALPHABET)), data.draw(pieces_of(ALPHABET))
  student.digest = "student"  # also if they are equal
  roles = {teacher.size - 1: student.size - 1} if data.draw(st.booleans()) else {}
  text = data.draw(st.text("aé", min_size=1, max_size=6)).encode()
  cut = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 1))
  text = text[cut[0] : len(text) - cut[1]]
  if not text:
    return
  tables = PairTables(teacher, student, roles)
  by_bytes = [data.draw(st.sampled_from(spellings(teacher, text)))]
  tokens = np.array(by_bytes[0] + ([teacher.size - 1] if roles and not cut[1] else []))
  n, size = 60, teacher.size
  rng = np.random.default_rng(data.draw(st.integers(0, 99)))
  counts = 1 + np.array([rng.multinomial(n - size, np.full(size, 1 / size)) for _ in tokens])
  q = counts / n
  aligned, skipped = align(tables, [tokens])
  if skipped:
    assert is_cut_inside(text)
    return
  check_alignment(aligned, teacher, student, tokens, text)
  if not len(h := taught(aligned)):
    return
  projected = project(tables, aligned, teacher_rows(n, tokens, counts, q), h, 0.0)
  want, want_lost = expected(Reference(teacher, student, roles), aligned, q, h)
  got = dense(projected, student.size) / (n * POINT)
  hard = projected.hard_X  # all mass is lost
  np.testing.assert_allclose(got[~hard], want[~hard], atol=1e-11)
  np.testing.assert_allclose(projected.lost_X, want_lost, atol=1e-11)
  np.testing.assert_allclose(got[~hard].sum(1) + want_lost[~hard], 1, atol=1e-11)
  label = got[np.arange(len(h)), aligned.id_H[h]]
  np.testing.assert_allclose(np.exp(projected.label_logp_X[~hard]), label[~hard], atol=1e-11)
  assert ((got[hard] == 1).sum(1) == 1).all()


def spellings(vocabulary, data):
  """All tokens of some bytes, the first hundred."""
  if not data:
    return [[]]
  return [
    [i, *rest]
    for b, i in vocabulary.id_of.items()
    if data.startswith(b)
    for rest in spellings(vocabulary, data[len(b) :])
  ][:100]


def is_cut_inside(text):
  """True if bytes are more than a text that is cut at its ends."""
  try:
    text.lstrip(b"\xa9").rstrip(b"\xc3").decode()
  except UnicodeDecodeError:
    return True
  return False


def check_alignment(aligned, teacher, student, tokens, text):
  """The student's tokens spell the whole characters of the text, each at its place."""
  whole = text.lstrip(b"\xa9")[:1] and text.removeprefix(b"\xa9").removesuffix(b"\xc3")
  ids = [i for i in aligned.id_H.tolist() if student.bytes_V[i] is not None]
  assert student.spell(ids) == whole
  head = len(text) - len(text.removeprefix(b"\xa9"))
  place = head
  for u, start, end in zip(aligned.id_H, aligned.start_H, aligned.end_H, strict=True):
    assert start == place and end - start == max(student.length_V[u], 1)
    place = end
  np.testing.assert_array_equal(aligned.token_G, tokens)
  inside = aligned.start_H - aligned.start_G[aligned.g_H]
  np.testing.assert_array_equal(inside, aligned.offset_H)
  assert (inside >= 0).all() and (
    inside < aligned.end_G[aligned.g_H] - aligned.start_G[aligned.g_H]
  ).all()


def test_the_exact_probability_of_the_label_enters_mid_rows():
  """With counts alone, a row without a sample inside of the token would be empty."""
  tables = PairTables(TEACHER, STUDENT, ROLES)
  tokens = np.array([1, 5, 7])  # a|ab|ca: the student has a|abc|..., in which "abc" ends inside ca
  aligned, _ = align(tables, [tokens])
  h = np.flatnonzero(aligned.offset_H > 0)
  assert len(h)
  q = np.full((3, TEACHER.size), 0.1)
  counts = np.zeros((3, TEACHER.size), int)
  counts[:, 1] = 4  # all samples are "a"
  projected = project(tables, aligned, teacher_rows(4, tokens, counts, q), h, 0.0)
  assert not projected.hard_X.any()
  np.testing.assert_allclose(projected.mass_X, 0.1, rtol=1e-12)
  hard = project(tables, aligned, teacher_rows(4, tokens, counts, q), h, 0.2)
  assert hard.hard_X.all()
  np.testing.assert_array_equal(hard.id_E, aligned.id_H[h])
  np.testing.assert_array_equal(hard.weight_E, 4 * POINT)


def test_resampling_is_unbiased_and_keeps_whole_counts():
  rng, n = np.random.default_rng(0), 5
  weight = rng.integers(1, n * POINT, 6)
  ends = np.cumsum(weight)[:-1] / weight.sum() * n
  cuts = np.unique(np.concatenate([[0, 1], ends - np.floor(ends)]))
  u = (cuts[1:] + cuts[:-1]) / 2
  starts = np.arange(len(u) + 1) * 6
  counts = resample(starts, np.tile(weight, len(u)), np.arange(len(u)), n, u).reshape(len(u), 6)
  assert (counts.sum(1) == n).all() and (counts >= 0).all()
  np.testing.assert_allclose(np.diff(cuts) @ counts / n, weight / weight.sum(), atol=1e-12)
  whole = np.array([2, 3, *weight[:2]])
  whole[:2] *= POINT
  counts = resample(np.array([0, 2, 4]), whole, np.array([1]), n, np.array([0.5]))
  np.testing.assert_array_equal(counts[:2], [2, 3])
  assert counts[2:].sum() == n
