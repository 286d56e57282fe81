"""Best-fit packing: whole documents, little waste, windows that depend on nothing outside them."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax.data import packing
from distill_jax.data.packing import BestFitPacker, TokenBlock, pack

pytestmark = pytest.mark.smoke


def block(lengths, first=1):
  """Documents of these lengths, all tokens of which differ."""
  ids_X = np.arange(first, first + sum(lengths), dtype=np.int32)
  return TokenBlock(ids_X, np.array(lengths, np.int64))


def packed(blocks, lengths):
  packer = BestFitPacker(lengths)
  return [*itertools.chain.from_iterable(map(packer.add, blocks)), *packer.finish()]


def pieces(row):
  """The tokens of each segment of a row."""
  return [row.tokens_T[row.segments_T == s].tolist() for s in range(1, row.segments_T.max() + 1)]


def test_a_worked_example():
  docs = [list(range(1, 6)), list(range(10, 14)), list(range(20, 32)), [40], [50, 51, 52]]
  rows = list(pack(docs, 8, None, whole=True))
  assert [pieces(row) for row in rows] == [
    [[1, 2, 3, 4, 5], [50, 51, 52]],
    [[10, 11, 12, 13], [28, 29, 30, 31]],  # with the rest of the long document, which fits best
    [[20, 21, 22, 23, 24, 25, 26, 27]],
    [[40]],
  ]
  assert [row.stop for row in rows] == [0, 0, 0, 25]


def test_short_documents_fill_long_rows_before_they_open_short_ones():
  rows = packed([block([3, 9, 2, 3, 4, 14])], (4, 16))
  assert [[len(piece) for piece in pieces(row)] for row in rows] == [[3, 9, 4], [3], [2, 14]]
  assert [len(row.tokens_T) for row in rows] == [16, 4, 16]


@settings(max_examples=100, deadline=None)
@given(
  st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any),
  st.sampled_from([(16,), (4, 16), (2, 8, 16)]),
  st.integers(1, 60),
)
def test_every_token_occurs_once_and_blocks_do_not_matter(documents, lengths, at):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(packing, "WINDOW_ROWS", 3)
    whole = block(documents)
    rows = packed([whole], lengths)
    again = packed(whole.split(at), lengths)
  got = sorted(itertools.chain.from_iterable(piece for row in rows for piece in pieces(row)))
  assert got == whole.ids_X.tolist()
  starts = np.cumsum([1, *documents])
  for row in rows:
    T, parts = len(row.tokens_T), pieces(row)
    assert T in lengths and parts == sorted(parts)
    for part in parts:
      assert part == list(range(part[0], part[-1] + 1))
      document = np.searchsorted(starts, part[0], "right") - 1
      cut = (16, documents[document] % 16) if documents[document] > 16 else (documents[document],)
      assert len(part) in cut
    smaller = max((n for n in lengths if n < T), default=0)
    assert max(map(len, parts)) > smaller  # otherwise, a smaller row would have held it
  assert [row.stop for row in rows] == [row.stop for row in again]
  for row, other in zip(rows, again, strict=True):
    for name in ("tokens_T", "segments_T", "token_mask_T", "smoothing_T"):
      np.testing.assert_array_equal(getattr(row, name), getattr(other, name))


def test_masks_and_label_smoothing_stay_with_their_documents():
  docs = [
    packing.MaskedDocument([1, 2, 3], [False, True, True], 0.25),
    packing.MaskedDocument([4] * 7, [True] * 7, 0.5),
    packing.MaskedDocument([5], [True], 0.75),
  ]
  short, long = pack(docs, 8, None, whole=True)
  assert short.tokens_T.tolist() == [1, 2, 3, 0, 0, 0, 0, 0]
  assert short.token_mask_T.tolist() == [False, True, True] + [False] * 5
  assert short.smoothing_T.tolist() == [0.25] * 3 + [0] * 5
  assert long.tokens_T.tolist() == [4] * 7 + [5]
  assert long.smoothing_T.tolist() == [0.5] * 7 + [0.75]


@pytest.mark.parametrize("lengths", [(512,), (64, 512), (32, 64, 128, 256, 512)])
def test_at_most_two_percent_are_wasted(lengths):
  """The lengths are those of 5,000-token documents in rows of 32,768, divided by 64."""
  draw = np.random.default_rng(0).lognormal(np.log(5000 / 64) - 0.5, 1.0, 3400)
  documents = np.maximum(1, draw.astype(int))
  rows = packed([block(documents.tolist())], lengths)
  wasted = 1 - documents.sum() / sum(len(row.tokens_T) for row in rows)
  assert documents.sum() > 3.5 * packing.WINDOW_ROWS * 512  # windows
  assert wasted < 0.02
