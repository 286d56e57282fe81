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

  def __init__(self, n, first=0):
    self.n, self.first = n, first

  def __len__(self):
    return self.n

  def read_many(self, indices):
    ones = {"segments_T": np.ones(4, np.int32), "mask_T": np.ones(4, bool)}
    return [{"tokens_T": np.full(4, self.first + i, np.int32), **ones} for i in indices]


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


def test_starting_at_a_step_continues_the_same_batches():
  whole = read([Store(10)], 9)
  for start in (1, 4, 7):  # in and past the first epoch
    np.testing.assert_array_equal(read([Store(10)], 9 - start, start=start), whole[start:])


@pytest.mark.parametrize("held", [[0, 1], [3], [0, 2, 3], [0, 1, 2, 3]])
def test_a_process_reads_the_rows_of_each_global_batch_that_it_holds(held):
  whole = read([Store(10)], 5)
  np.testing.assert_array_equal(read([Store(10)], 5, held=np.array(held)), whole[:, held])
  np.testing.assert_array_equal(read([Store(10)], 2, start=3, held=np.array(held)), whole[3:, held])


def test_stores_are_mixed_by_weight_also_after_resuming():
  stores = [Store(30), Store(30, first=1000)]
  rows = read(stores, 100, mixture=(3.0, 1.0))
  share = np.mean(rows < 1000)
  assert share == pytest.approx(0.75, abs=0.01)
  np.testing.assert_array_equal(read(stores, 50, mixture=(3.0, 1.0), start=50), rows[50:])
  by_size = read([Store(10), Store(30, first=1000)], 40)
  assert np.mean(by_size < 1000) == pytest.approx(0.25, abs=0.01)


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
  }
  batch = collate.collate(
    [Store(1).read_many([0])[0] | ids(2), Store(1).read_many([0])[0] | ids(3)]
  )
  t = batch.targets["teacher"]
  assert t.ids_BTK.shape == (2, 4, 3)
  assert not t.weight_BTK[0, :, 2].any()
  assert np.all(t.logp_BTK[0, :, 2] == -np.inf)
  assert collate.collate([Store(1).read_many([0])[0] | ids(2)], with_targets=False).targets == {}
