"""Packing follows its rules, checked token by token."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax.data.model_rows import label_mask, next_tokens, positions
from distill_jax.data.packing import pack
from distill_jax.errors import InputError
from distill_jax.types import Inputs

pytestmark = pytest.mark.smoke

EOS = 999
# All tokens of a corpus differ, so that a lost or repeated token is noticed.
CORPORA = st.lists(st.integers(0, 23), min_size=1, max_size=12).filter(any)


def corpus(lengths):
  numbers = itertools.count(1000)
  return [[next(numbers) for _ in range(n)] for n in lengths]


@settings(max_examples=200, deadline=None)
@given(CORPORA, st.integers(2, 17), st.sampled_from([EOS, None]))
def test_no_token_is_lost_repeated_or_moved(lengths, seq_len, eos_id):
  documents = corpus(lengths)
  rows = list(pack(iter(documents), seq_len, eos_id))
  laid = [t for d in documents if d for t in d + ([EOS] if eos_id is not None else [])]
  got = [t for r in rows for t, s in zip(r.tokens_T, r.segments_T, strict=True) if s]
  assert got == laid
  assert len(rows) == -(-len(laid) // seq_len)
  for r in rows:
    assert r.tokens_T.dtype == r.segments_T.dtype == np.int32 and r.token_mask_T.dtype == bool
    assert r.tokens_T.shape == r.segments_T.shape == r.token_mask_T.shape == (seq_len,)
    assert np.array_equal(r.token_mask_T, r.segments_T > 0)
    assert not r.tokens_T[r.segments_T == 0].any()
  assert all((r.segments_T > 0).all() for r in rows[:-1])


@settings(max_examples=200, deadline=None)
@given(CORPORA, st.integers(2, 17))
def test_segments_are_documents(lengths, seq_len):
  documents = corpus(lengths)
  owner = {t: i for i, d in enumerate(documents) for t in d}
  for r in pack(documents, seq_len, None):
    used = r.segments_T[r.segments_T > 0]
    assert used[0] == 1 and set(np.diff(used)) <= {0, 1}
    for a, b in itertools.pairwise(range(len(used))):
      together = owner[r.tokens_T[a]] == owner[r.tokens_T[b]]
      assert together == (r.segments_T[a] == r.segments_T[b])


@settings(max_examples=200, deadline=None)
@given(CORPORA, st.integers(2, 17), st.randoms(use_true_random=False))
def test_inputs_and_labels_are_right_at_every_position(lengths, seq_len, random):
  documents = [(d, [random.random() < 0.5 for _ in d]) for d in corpus(lengths)]
  wanted = {t: m for ids, mask in documents for t, m in zip(ids, mask, strict=True)}
  rows = list(pack(documents, seq_len, None))
  tokens, segments, token_mask = (
    np.stack([getattr(r, f) for r in rows]) for f in ("tokens_T", "segments_T", "token_mask_T")
  )
  labels, mask = next_tokens(tokens), label_mask(segments, token_mask)
  found = positions(segments)
  assert labels.dtype == found.dtype == np.int32 and mask.dtype == bool
  np.testing.assert_array_equal(Inputs.of(tokens, segments).positions_BT, found)
  for b in range(len(rows)):
    start = 0
    for t in range(seq_len):
      if t and segments[b, t] != segments[b, t - 1]:
        start = t
      assert found[b, t] == t - start
      inside = t + 1 < seq_len and segments[b, t] == segments[b, t + 1] != 0
      assert mask[b, t] == (inside and wanted[tokens[b, t + 1]])
      if mask[b, t]:
        assert labels[b, t] == tokens[b, t + 1]
    assert np.array_equal(positions(segments[b]), found[b])
    assert np.array_equal(next_tokens(tokens[b]), labels[b])
    assert np.array_equal(label_mask(segments[b], token_mask[b]), mask[b])


def test_a_worked_example():
  rows = list(pack([[1, 2, 3], [], [4], [5, 6]], 5, 9))
  assert [r.tokens_T.tolist() for r in rows] == [[1, 2, 3, 9, 4], [9, 5, 6, 9, 0]]
  assert [r.segments_T.tolist() for r in rows] == [[1, 1, 1, 1, 2], [1, 2, 2, 2, 0]]
  assert positions(rows[0].segments_T).tolist() == [0, 1, 2, 3, 0]
  assert next_tokens(rows[0].tokens_T).tolist() == [2, 3, 9, 4, 0]
  assert rows[0].record()["mask_T"].tolist() == [True, True, True, False, False]


def test_eos_is_trained_on_if_the_last_token_is():
  trained, not_trained = ([1, 2], [False, True]), ([3, 4], [True, False])
  row = next(pack([trained, not_trained], 6, 9))
  assert row.token_mask_T.tolist() == [False, True, True, True, False, False]


def test_documents_are_read_lazily():
  taken = 0

  def endless():
    nonlocal taken
    while True:
      taken += 1
      yield [taken] * 3

  rows = list(itertools.islice(pack(endless(), 8, None), 5))
  assert len(rows) == 5 and taken <= 14
  assert len({id(r.tokens_T) for r in rows}) == 5  # arrays of a row are not reused


@pytest.mark.parametrize(
  "documents, message",
  [
    ([[1, -2]], "Document 0"),
    ([[1], [1.5]], "Document 1"),
    ([[[1]]], "Document 0"),
    ([[2**31]], "Document 0"),
    (["a text"], "Document 0 is an array of <U6"),
    ([([1, 2], [True])], "mask of shape"),
    ([], "no tokens"),
    ([[], []], "no tokens"),
  ],
)
def test_invalid_documents_are_errors(documents, message):
  with pytest.raises(InputError, match=message):
    list(pack(documents, 4, None))


def test_invalid_arguments_are_errors_at_once():
  with pytest.raises(InputError, match="seq_len is 1"):
    pack([[1]], 1, None)
  with pytest.raises(InputError, match="eos_id is -1"):
    pack([[1]], 4, -1)


def test_padding_is_never_trained_on_whatever_the_mask():
  segments = np.array([1, 1, 0, 0, 0])
  assert label_mask(segments, np.ones(5, bool)).tolist() == [True, False, False, False, False]
