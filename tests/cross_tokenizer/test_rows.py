"""Records in another tokenizer's tokens: identity, masks, roles, order, statistics."""

import itertools

import numpy as np
import pytest
import small_tokenizers
from toy_vocabularies import Toy

from distill_jax.cross_tokenizer.align import CONTROL, CUT
from distill_jax.cross_tokenizer.project import project
from distill_jax.cross_tokenizer.roles import match_roles
from distill_jax.cross_tokenizer.rows import align_rows
from distill_jax.cross_tokenizer.statistics import Statistics
from distill_jax.cross_tokenizer.tables import PairTables
from distill_jax.cross_tokenizer.vocabulary import Vocabulary
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.records import bits, codec, store, tf_example
from distill_jax.records.fields import RecordSpec
from distill_jax.records.projected_rows import project_rows, teacher_rows

LETTERS = (b"a", b"b", b"c", b" ")
BOS, EOS = 7, 8
TEACHER = Toy(*LETTERS, b"ab", b"bc", b"ca", None, None, None)
STUDENT = Toy(*LETTERS, b"abc", b"b ", b" a", b"cab", None)
TABLES = PairTables(TEACHER, STUDENT, {EOS: 8})
N = 20


def source_row(*segments, length=24, mask=None, seed=0):
  """A record with exact counts, as it is read: every probability is a multiple of 1/N."""
  rng = np.random.default_rng(seed)
  tokens = [t for s in segments for t in s]
  padding = length - len(tokens)
  counts = 1 + rng.multinomial(N - TEACHER.size, np.full(TEACHER.size, 0.1), length)
  tokens_T = np.array(tokens + [0] * padding, np.int32)
  numbers = [[i] * len(s) for i, s in enumerate(segments, 1)]
  segments_T = np.array(sum(numbers, []) + [0] * padding, np.int32)
  label = np.append(tokens_T[1:], 0)
  same = np.append(segments_T[1:] == segments_T[:-1], False) & (segments_T > 0)
  q = counts / N
  row = {
    "tokens_T": tokens_T,
    "segments_T": segments_T,
    "mask_T": same if mask is None else same & mask,
    "ids_TN": np.stack([np.repeat(np.arange(TEACHER.size), c) for c in counts]),
    "argmax_T": q.argmax(1).astype(np.int32),
    "label_logp_T": np.log(q[np.arange(length), label]),
    "entropy_T": -(q * np.log(q)).sum(1),
  }
  spec = RecordSpec("sampled", N, TEACHER.size)
  read = codec.decode_targets(
    bits.join([codec.encode_targets(row, spec)]), row["mask_T"][None], spec
  )
  text = {k: row[k] for k in ("tokens_T", "segments_T", "mask_T")}
  return text | {name: x[0] for name, x in read.items()}


def text(data, *end):
  return [*TEACHER.encode_inner(data), *end]


def convert(rows, length=32, first=0, tables=TABLES, **options):
  return project_rows(
    tables, rows, length, **{"n": N, "first": first, "seed": 3, "min_mass": 0.1} | options
  )


@pytest.mark.parametrize("is_shortcut", [True, False])
def test_the_same_tokenizer_returns_every_record_bit_for_bit(tiny_run, is_shortcut):
  whole = store.open_store(tiny_run / "records")
  vocabulary = Vocabulary(load_tokenizer(tiny_run / "tokenizer.json"))
  student = Vocabulary(load_tokenizer(tiny_run / "tokenizer.json"))
  if not is_shortcut:  # then its text is tokenized, and its tokens are found by their bytes
    student.digest = "another"
  tables = PairTables(vocabulary, student, {})
  m = whole.manifest
  rows = whole.read_many(range(len(whole)))
  records, statistics = convert(rows, m.seq_len, n=m.n, tables=tables)
  for i, record in enumerate(records):
    place = (m.shards[i // m.sequences_per_shard], i)
    stored = tf_example.parse(whole._shards.read([place])[0])
    assert tf_example.encode(i, record, m) == stored
  assert statistics.kinds["exact"] == statistics.targets == statistics.teacher_targets
  assert statistics.misplaced_mass == statistics.lost_mass == statistics.hard_targets == 0


def test_records_do_not_depend_on_the_other_rows_of_a_call():
  rows = [source_row(text("abca ", EOS), text("bca cab ab"), seed=i) for i in range(7)]
  together, statistics = convert(rows)
  sums = Statistics()
  for size in (1, 3):
    for first in [*range(0, 7, size)][::-1]:
      some, part = convert(rows[first : first + size], first=first)
      sums += part
      for i, record in enumerate(some, first):
        for name, value in together[i].items():
          assert value.dtype == record[name].dtype
          assert value.tobytes() == record[name].tobytes(), name
  assert sums.targets == 2 * statistics.targets and sums.kinds["mid"] == 2 * statistics.kinds["mid"]
  other, _ = convert(rows, seed=4)
  counts = [[r["entry_counts_E"].tolist() for r in some] for some in (together, other)]
  assert counts[0] != counts[1]


def test_rows_are_taught_where_the_teacher_has_a_distribution():
  tokens = text("caabbcca a")
  mask = np.ones(24, bool)
  mask[1] = False  # the distribution of token 2 is missing
  row = source_row(tokens, mask=mask)
  aligned = align_rows(TABLES, [row], 32)
  g = aligned.aligned.g_H[aligned.token_X]
  assert 0 not in g and 2 not in g and {1, 3} <= {*g.tolist()}
  np.testing.assert_array_equal(aligned.teacher_position_X, g - 1)
  taught = np.flatnonzero(aligned.records[0]["mask_T"])
  np.testing.assert_array_equal(taught, aligned.position_X)
  labels = aligned.records[0]["tokens_T"][taught + 1]
  np.testing.assert_array_equal(labels, aligned.aligned.id_H[aligned.token_X])
  # "cab" | "abc" span tokens: what is not known of the next distribution goes to the label.
  (record,) = convert([row])[0]
  assert record["entry_ids_E"].max() < STUDENT.size
  assert len(record["entries_S"]) == record["mask_T"].sum()


def test_segments_have_their_own_numbers_and_first_tokens():
  aligned = align_rows(TABLES, [source_row(text("abca", EOS), text("b ab"))], 32)
  record = aligned.records[0]
  counts = np.bincount(record["segments_T"])[1:]
  np.testing.assert_array_equal(record["tokens_T"][: counts.sum()], aligned.aligned.id_H)
  assert len(counts) == 2 and record["tokens_T"][counts[0] - 1] == 8  # EOS by its role
  first = [0, counts[0]]
  assert not set(first) & set((aligned.position_X + 1).tolist())
  assert counts[0] - 1 in aligned.position_X + 1


@pytest.mark.parametrize("has_bos", [False, True])
def test_documents_begin_as_the_students_tokenizer_begins_them(has_bos):
  """The first segment of a row may be the rest of a document: it has a BOS if the teacher's has."""
  teacher = (
    small_tokenizers.sentencepiece_model(False) if has_bos else small_tokenizers.byte_level()
  )
  student = small_tokenizers.sentencepiece_model(True)
  ours, theirs = Vocabulary(teacher), Vocabulary(student)
  document = [*teacher.begin, *teacher.encode("the theme"), teacher.eos_id]
  segments_T = np.repeat([1, 2, 0], [len(document), len(document), 3]).astype(np.int32)
  same = np.append(segments_T[1:] == segments_T[:-1], False) & (segments_T > 0)
  tokens_T = np.array([*document, *document, 0, 0, 0], np.int32)
  row = {"tokens_T": tokens_T, "segments_T": segments_T, "mask_T": same}
  tables = PairTables(ours, theirs, match_roles(ours, theirs, {}))
  aligned = align_rows(tables, [row], 64)
  text = [*student.encode("the theme"), student.eos_id]
  expected = [*(student.begin if has_bos else []), *text, *student.begin, *text]
  (record,) = aligned.records
  assert record["tokens_T"][: len(expected)].tolist() == expected
  # All tokens of a text are taught but its first: the dummy space of it has no place in the bytes.
  assert record["mask_T"].sum() == len(aligned.token_X) == 2 * (len(text) - 1)


def test_control_tokens_without_a_role_are_skipped_and_counted():
  rows = [
    source_row([BOS, *text("abca")], text("ab", 9) + text("ca")),
    source_row(text("ca", EOS)),
  ]
  aligned = align_rows(TABLES, rows, 32)
  assert aligned.skipped == {CONTROL: 1} and aligned.lengths == [2, 3]
  # The token after a BOS that the student lacks is the first of its segment.
  assert not aligned.records[0]["mask_T"][0] or aligned.position_X[0] == 0
  records, statistics = convert(rows)
  assert statistics.skipped == {CONTROL: 1} and statistics.lost_mass > 0  # samples of 7 and 9
  assert all(len(r["tokens_T"]) == 32 for r in records)


def test_bytes_that_are_not_text_are_skipped():
  teacher, student = Toy(b"a", b"\xff", b"\xc3", b"\xa9"), Toy(b"a", b"\xc3\xa9")
  tables = PairTables(teacher, student, {})
  row = {"segments_T": np.array([1, 1, 1, 1, 2, 2, 2, 2]), "mask_T": np.zeros(8, bool)}
  row["tokens_T"] = np.array([0, 1, 0, 0, 3, 0, 2, 3])
  aligned = align_rows(tables, [row], 8)
  assert aligned.skipped == {CUT: 1}
  np.testing.assert_array_equal(aligned.records[0]["tokens_T"][:2], [0, 1])


class Spaced(Toy):
  """A vocabulary that puts a dummy space before a text, as Llama 2."""

  def locate(self, text):
    ids, places = super().locate(" " + text)
    return ids, places - 1


@pytest.mark.parametrize(
  "teacher_type, student_type", [*itertools.product([Toy, Spaced], repeat=2)]
)
def test_a_dummy_space_is_not_part_of_the_text(teacher_type, student_type):
  pieces = (b" ", b"a", b"b", b" a", b"ab", None)
  teacher, student = teacher_type(*pieces), student_type(*pieces, b"ba", None)
  tables = PairTables(teacher, student, {5: 7})
  has_space = teacher_type is Spaced
  tokens = np.array([3, 2, 1, 5] if has_space else [1, 2, 1, 5])  # "aba", with or without it
  row = {"tokens_T": tokens, "segments_T": np.ones(4, int), "mask_T": np.ones(4, bool)}
  aligned = align_rows(tables, [row], 8)
  record = aligned.records[0]
  own_space = student_type is Spaced
  np.testing.assert_array_equal(record["tokens_T"][:3], [3, 6, 7] if own_space else [4, 1, 7])
  np.testing.assert_array_equal(aligned.aligned.end_H[-2:], has_space + np.array([3, 4]))
  np.testing.assert_array_equal(aligned.position_X, [0, 1])


@pytest.mark.parametrize("others", [["ab"], []])
def test_a_row_without_text_is_padding(others):
  rows = [source_row(text("ab", 9) + text("c")), *(source_row(text(other)) for other in others)]
  records, statistics = convert(rows)
  assert not records[0]["segments_T"].any() and not records[0]["mask_T"].any()
  spec = RecordSpec("sampled", N, STUDENT.size)
  for record in records:
    fields = codec.encode_targets(record, spec)
    read = codec.decode_targets(bits.join([fields]), record["mask_T"][None], spec)
    np.testing.assert_allclose(read["weight_TK"][0].sum(1), record["mask_T"], atol=1e-6)
  assert statistics.rows == len(rows)


def test_tokens_that_do_not_fit_are_cut_and_counted():
  row = source_row(text("abca b ab cab"))
  long, short = align_rows(TABLES, [row], 32), align_rows(TABLES, [row], 4)
  assert short.lengths == long.lengths and short.lengths[0] > 4
  np.testing.assert_array_equal(short.records[0]["tokens_T"], long.records[0]["tokens_T"][:4])
  assert short.cut_targets == len(long.token_X) - len(short.token_X) > 0
  _, statistics = convert([row], 4)
  assert statistics.cut_tokens == long.lengths[0] - 4 and statistics.tokens == 4
  assert statistics.cut_targets == short.cut_targets


def test_scalars_of_exact_counts_are_those_of_the_projection():
  rows = [source_row(text("abca b ab cab"), seed=i) for i in range(5)]
  records, _ = convert(rows)
  aligned = align_rows(TABLES, rows, 32)
  teacher = teacher_rows(aligned, rows, N)
  exact = project(TABLES, aligned.aligned, teacher, aligned.token_X, 0.1)
  owner = np.repeat(np.arange(len(aligned.token_X)), np.diff(exact.start_X))
  p = np.zeros((len(aligned.token_X), STUDENT.size))
  p[owner, exact.id_E] = exact.weight_E
  p /= p.sum(1, keepdims=True)
  names = ("argmax_T", "entropy_T", "label_logp_T")
  got = {k: np.stack([r[k] for r in records])[aligned.row_X, aligned.position_X] for k in names}
  top = p[np.arange(len(p)), got["argmax_T"]]
  assert (top >= p.max(1) - 1 / N / (1 - exact.lost_X) - 1e-9).all()
  entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(1)
  np.testing.assert_allclose(got["entropy_T"], entropy, atol=2e-3)  # the source has float16
  np.testing.assert_allclose(got["label_logp_T"], exact.label_logp_X, rtol=1e-6)


def test_a_source_without_entropies_gives_none():
  row = source_row(text("abca b"))
  del row["entropy_T"]
  records, _ = convert([row])
  assert "entropy_T" not in records[0]


def test_statistics_add_up():
  a = Statistics(rows=1, targets=4, unresolved_mass=2.0, opened_mass=1.0, beyond_mass=0.5)
  a.kinds["exact"] = 3
  total = a + a
  assert total.rows == 2 and total.kinds == {"exact": 6} and total.misplaced_mass == 0.25
