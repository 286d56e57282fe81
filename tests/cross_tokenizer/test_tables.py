"""The tables of a pair of tokenizers, and the estimate of misplaced mass."""

import pickle

import numpy as np
import pytest
from toy_vocabularies import Toy

from distill_jax.cross_tokenizer.align import align
from distill_jax.cross_tokenizer.project import TeacherRows, project
from distill_jax.cross_tokenizer.statistics import Statistics
from distill_jax.cross_tokenizer.tables import PairTables


class FromTheRight(Toy):
  """A vocabulary whose first token of a text need not be the longest that begins it."""

  def encode_inner(self, text):
    data, ids = text.encode(), []
    while data:
      piece = next(data[-n:] for n in range(self.longest, 0, -1) if data[-n:] in self.id_of)
      ids.insert(0, self.id_of[piece])
      data = data[: -len(piece)]
    return ids


def test_phi_is_the_first_token_of_the_students_own_tokenisation():
  teacher = Toy(b"a", b"b", b"c", b"abc", b"abc\xff", None, None)
  student = FromTheRight(b"a", b"b", b"c", b"ab", b"bc", None)
  tables = PairTables(teacher, student, {6: 5})
  assert tables.phi_V.tolist() == [0, 1, 2, 0, 3, -1, 5]  # abc is a|bc; abc\xff is not a text
  places = tables.offset_V[3] + np.arange(3)
  assert tables.phi_P[places].tolist() == [0, 4, 2]


def test_equal_tokenizers_keep_every_token():
  teacher, student = Toy(b"a", b"ab", None, b"ab"), Toy(b"a", b"ab", None, b"ab")
  tables = PairTables(teacher, student, {})
  assert tables.same and tables.phi_V.tolist() == [0, 1, 2, 3] and not tables.is_open_V.any()


def test_the_overlap_is_a_share_of_each_vocabulary():
  tables = PairTables(Toy(b"a", b"b", b"aa", None), Toy(b"a", b"b", b"ab", b"ba"), {})
  assert tables.overlap() == (0.5, 2 / 3)


def test_tables_can_be_pickled():
  tables = PairTables(Toy(b"a", b"b", None), Toy(b"a", b"b", b"ab"), {})
  again = pickle.loads(pickle.dumps(tables))
  state, token = np.array([0, 0, -1]), np.array([1, 0, 1])
  assert again.look(state, token).tolist() == tables.look(state, token).tolist() == [2, -1, -1]


@pytest.mark.parametrize("words", [(b"xab", b"xabc"), (b"xabc", b"xab")])
def test_the_longest_word_has_the_mass_in_any_order_of_ids(words):
  """All of the teacher's tokens that complete xab complete xabc."""
  teacher = Toy(b"x", b"a", b"b", b"c", b"abc")
  student = Toy(b"x", b"a", b"b", b"c", *words)
  tables = PairTables(teacher, student, {})
  found = tables.look(tables.state_V[[0]], np.array([4]))
  assert found.tolist() == [student.id_of[b"xabc"]]


def test_misplaced_mass_is_estimated_from_the_tokens_in_the_text():
  """The student's "ab" is a|b for the teacher. Mass of "a" goes on to "ab" where b is next."""
  tables = PairTables(Toy(b"a", b"b", b"c"), Toy(b"a", b"b", b"c", b"ab"), {})
  aligned, _ = align(tables, [np.array([2, 0, 2, 2])])
  counts = np.array([[0, 0, 0], [4, 3, 3], [3, 5, 2], [1, 0, 9]])  # of c, a, c, c
  used = np.nonzero(counts)
  ends = np.cumsum((counts > 0).sum(1))
  rows = TeacherRows(
    10, used[1], counts[used], np.append(0, ends[:-1]), ends, np.log([1, 0.4, 0.2, 0.9])
  )
  p = project(tables, aligned, rows, np.array([1, 2, 3]), 0.0)
  np.testing.assert_allclose(
    p.opened_X, [0.4, 0, 0]
  )  # the "a" of the text, whose next row is known
  np.testing.assert_allclose(p.beyond_X, [0.4 * 0.5, 0, 0])
  np.testing.assert_allclose(p.unresolved_X, [0, 0.3, 0.1])  # an "a" that is not in the text
  sums = {"unresolved_mass": 0.4, "opened_mass": 0.4, "beyond_mass": 0.2}
  np.testing.assert_allclose(Statistics(targets=2, **sums).misplaced_mass, 0.4 * 0.5 / 2)
