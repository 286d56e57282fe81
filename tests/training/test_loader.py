"""Tests of the loader: batches depend on (stores, seed, step), not on the processes."""

import itertools

import numpy as np
import pytest

from distill_jax.errors import InputError
from distill_jax.records import collate
from distill_jax.training import loader

pytestmark = pytest.mark.smoke


class Store:
  """A store of sequences that differ in their first token."""

  def __init__(self, n, first=0, length=4):
    self.n, self.first, self.length = n, first, length

  def __len__(self):
    return self.n

  def read_many(self, indices):
    T = self.length
    ones = {"segments_T": np.ones(T, np.int32), "mask_T": np.ones(T, bool)}
    return [{"tokens_T": np.full(T, self.first + i, np.int32), **ones} for i in indices]


def read(stores, n, **options):
  """Returns the first tokens of n batches, [n, B]."""
  options = {"batch_size": 4, "seed": 0, **options}
  batches = itertools.islice(loader.batches(stores, **options), n)
  return np.stack([b.inputs.tokens_BT[:, 0] for b in batches])


def test_an_epoch_has_every_sequence_once_in_a_new_order():
  rows = read([Store(12)], 6).reshape(2, 12)
  for epoch in rows:
    assert sorted(epoch) == list(range(12))
  assert list(rows[0]) != list(rows[1])


def test_batches_depend_only_on_the_seed():
  np.testing.assert_array_equal(read([Store(40)], 5), read([Store(40)], 5))
  assert np.any(read([Store(40)], 5) != read([Store(40)], 5, seed=1))


@pytest.mark.parametrize("targets", [True, False])
def test_stores_with_and_without_label_smoothing_are_mixed(targets):
  """With an online teacher (targets=False), too."""

  class Smoothed(Store):
    def read_many(self, indices):
      smoothing_T = np.full(self.length, 0.25, np.float32)
      return [row | {"smoothing_T": smoothing_T} for row in super().read_many(indices)]

  batches = loader.batches(
    [Store(6), Smoothed(6, first=100)], batch_size=4, seed=0, targets=targets
  )
  for batch in itertools.islice(batches, 6):
    is_smoothed_B = batch.inputs.tokens_BT[:, 0] >= 100
    np.testing.assert_array_equal(batch.smoothing_BT[:, 0], np.where(is_smoothed_B, 0.25, 0))


def test_starting_at_a_step_continues_the_same_batches():
  whole = read([Store(10)], 9)
  for start in (1, 4, 7):  # in and past the first epoch
    np.testing.assert_array_equal(read([Store(10)], 9 - start, start=start), whole[start:])


@pytest.mark.parametrize("held", [[0, 1], [3], [0, 2, 3], [0, 1, 2, 3]])
def test_a_process_reads_the_rows_of_each_global_batch_that_it_holds(held):
  whole = read([Store(10)], 5)
  np.testing.assert_array_equal(
    read([Store(10)], 5, held=lambda size: np.array(held)), whole[:, held]
  )
  np.testing.assert_array_equal(
    read([Store(10)], 2, start=3, held=lambda size: np.array(held)), whole[3:, held]
  )


def test_stores_are_mixed_by_weight_also_after_resuming():
  stores = [Store(30), Store(30, first=1000)]
  rows = read(stores, 100, mixture=(3.0, 1.0))
  share = np.mean(rows < 1000)
  assert share == pytest.approx(0.75, abs=0.01)
  np.testing.assert_array_equal(read(stores, 50, mixture=(3.0, 1.0), start=50), rows[50:])
  by_size = read([Store(10), Store(30, first=1000)], 40)
  assert np.mean(by_size < 1000) == pytest.approx(0.25, abs=0.01)


def stores_of_lengths():
  return [Store(24, 0, 4), Store(16, 100, 8), Store(6, 200, 16), Store(8, 300, 8)]


def by_length(n, **options):
  """Returns the first tokens of n batches of rows of several lengths."""
  stores = stores_of_lengths()
  options = {"batch_size": 2, "seed": 0, "lengths": [s.length for s in stores], **options}
  batches = itertools.islice(loader.batches(stores, **options), n)
  return [(b.inputs.tokens_BT.shape, b.inputs.tokens_BT[:, 0].tolist()) for b in batches]


def test_batches_have_one_length_and_equally_many_tokens():
  batches = by_length(12)  # an epoch: 96 + 192 + 96 tokens in batches of 32
  assert {shape for shape, _ in batches} == {(8, 4), (4, 8), (2, 16)}
  seen = sorted(itertools.chain.from_iterable(rows for _, rows in batches))
  assert seen == [*range(24), *range(100, 116), *range(200, 206), *range(300, 308)]
  of_8 = [rows for shape, rows in batches if shape == (4, 8)]
  alone = read([Store(16, 100), Store(8, 300)], 6)  # mixed as stores of one length are
  assert of_8 == alone.tolist()


def test_batches_of_several_lengths_depend_only_on_the_step_and_the_rows_held():
  whole = by_length(30)
  for start in (1, 13):
    assert by_length(30 - start, start=start) == whole[start:]
  half = by_length(30, held=lambda size: np.arange(size // 2, size))
  assert [rows for _, rows in half] == [rows[len(rows) // 2 :] for _, rows in whole]


def test_weights_of_stores_of_several_lengths_are_shares_of_tokens():
  batches = by_length(200, mixture=(5.0, 2.0, 2.0, 1.0))
  of = {T: [rows for (_, n), rows in batches if n == T] for T in (4, 8, 16)}
  assert [len(of[T]) for T in (4, 8, 16)] == [100, 60, 40]
  assert np.mean(np.array(of[8]) < 300) == pytest.approx(2 / 3, abs=0.01)


def test_lengths_that_cannot_be_mixed_are_refused():
  with pytest.raises(InputError, match=r"sequences of \[4, 6\] tokens, but 4 does not divide 6"):
    loader.batches([Store(8), Store(8)], batch_size=2, seed=0, lengths=[6, 4])
  loader.batches([Store(8), Store(8)], batch_size=2, seed=0, lengths=[8, 4], targets=False)
  with_targets = Store(8)
  with_targets.read_many = lambda i: [{"ids_TK": 0, **row} for row in Store(8).read_many(i)]
  with pytest.raises(InputError, match="of 8 tokens lack ids_TK, which those with sequences of 4"):
    loader.batches([Store(8), with_targets], batch_size=2, seed=0, lengths=[8, 4])


def test_what_does_not_fit_is_refused():
  with pytest.raises(InputError, match=r"train.mixture is \(1\.0,\); expected 2 weights"):
    read([Store(8), Store(8)], 1, mixture=(1.0,))
  with pytest.raises(InputError, match="store is empty"):
    read([Store(0)], 1)


def test_different_numbers_of_entries_are_padded():
  ids = lambda K: {
    "ids_TK": np.ones((4, K), np.int32),
    "weight_TK": np.ones((4, K), np.float32),
    "logp_TK": np.zeros((4, K), np.float32),
    "label_logp_T": np.zeros(4, np.float32),
  }
  batch = collate.collate(
    [Store(1).read_many([0])[0] | ids(2), Store(1).read_many([0])[0] | ids(3)]
  )
  t = batch.targets["teacher"]
  assert t.ids_BTK.shape == (2, 4, 3)
  assert not t.weight_BTK[0, :, 2].any()
  assert np.all(t.logp_BTK[0, :, 2] == -np.inf)
  assert collate.collate([Store(1).read_many([0])[0] | ids(2)], with_targets=False).targets == {}
