"""Stores in the form that trainers take."""

import pickle
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from tiny_store import N, T, V, manifest, record, sequence

import distill_jax as dj
from distill_jax.errors import InputError
from distill_jax.records import formats
from distill_jax.records.fields import Record

MAXTEXT = {
  "inputs",
  "inputs_position",
  "inputs_segmentation",
  "targets",
  "targets_position",
  "targets_segmentation",
}


def topk_sequence(i) -> Record:
  """Fewer entries in every second position, as a nucleus leaves them."""
  rng = np.random.default_rng(i)
  seq = sequence(i)
  ids = np.argsort(rng.random((T, V)), 1)[:, :N].astype(np.int32)
  logp = np.log(rng.dirichlet(np.ones(N), T)).astype(np.float32)
  logp[::2, N // 2 :] = -np.inf
  return seq | {"ids_TN": ids, "logp_TN": logp, "argmax_T": ids[:, 0]}


@pytest.fixture(scope="module")
def topk_store(tmp_path_factory):
  folder = tmp_path_factory.mktemp("topk")
  m = manifest(4, kind="topk", missing_mass="renormalise")
  record(folder, m, make=topk_sequence)
  return dj.open_store(folder)


def test_an_example_has_shifted_targets_and_positions_per_segment(whole):
  got, seq = dj.open_store(whole).example(3), sequence(3)
  tokens, segments = seq["tokens_T"], seq["segments_T"]
  np.testing.assert_array_equal(got["inputs"], tokens)
  np.testing.assert_array_equal(got["targets"][:-1], tokens[1:])
  np.testing.assert_array_equal(got["inputs_segmentation"], segments)
  positions = np.concatenate([np.arange(T - 12), np.arange(8), np.arange(4)])
  np.testing.assert_array_equal(got["inputs_position"], positions)
  np.testing.assert_array_equal(got["targets_position"], positions)
  np.testing.assert_array_equal(got["mask"], seq["mask_T"])
  np.testing.assert_array_equal(got["targets_segmentation"], segments * seq["mask_T"])
  assert got["teacher_ids"].shape == got["teacher_weight"].shape == (T, N)
  assert got["teacher_entropy"].shape == got["teacher_argmax"].shape == (T,)


def test_maxtext_scatters_the_teachers_distribution(whole, topk_store):
  """MaxText puts the logits into a row of -10000s and takes its softmax: p, for kinds of both."""
  for store in (dj.open_store(whole), topk_store):
    row, got = store[1], formats.maxtext(store[1], store.manifest)
    assert got.keys() == MAXTEXT | {"top_k_indices", "top_k_logits"}
    dense = np.full((T, V), -10000.0, np.float32)
    np.put_along_axis(dense, got["top_k_indices"], got["top_k_logits"], 1)
    p = np.exp(dense - dense.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    want = np.zeros((T, V))
    weight = row["weight_TK"] if "weight_TK" in row else np.exp(row["logp_TK"])
    np.add.at(want, (np.arange(T)[:, None], row["ids_TK"]), weight)
    mask = row["mask_T"]
    want = want[mask] / want[mask].sum(1, keepdims=True)
    np.testing.assert_allclose(p[mask], want, atol=2e-6)
    for ids in got["top_k_indices"]:
      assert len(set(ids)) == N and ids.min() >= 0 and ids.max() < V
    assert got["top_k_indices"].dtype == np.int32 and got["top_k_logits"].dtype == np.float32


def test_unused_ids_are_free_ones_of_a_small_vocabulary():
  """K of a vocabulary of K: the unused entries have the ids that are left."""
  logp = np.array([[np.log(0.25), np.log(0.75), -np.inf, -np.inf]], np.float32)
  record = {"ids_TK": np.array([[1, 3, 0, 0]], np.int32), "logp_TK": logp}
  ids, logits = formats.top_k(record)
  assert sorted(ids[0]) == [0, 1, 2, 3]
  np.testing.assert_allclose(logits[0], [np.log(0.25), np.log(0.75), -1e4, -1e4])


def test_datasets_of_dicts(whole):
  store = dj.open_store(whole)
  plain = store.as_dataset()
  assert len(plain) == len(store)
  np.testing.assert_array_equal(plain[3]["inputs"], store.example(3)["inputs"])
  batches = list(store.as_dataset("maxtext", batch_size=4, seed=0))
  assert len(batches) == 2 and batches[0]["top_k_logits"].shape == (4, T, N)
  assert batches[0]["inputs"].dtype == np.int32


def test_each_epoch_has_its_own_order_and_holds_every_record(whole):
  store = dj.open_store(whole)
  tokens = [bytes(store[i]["tokens_T"]) for i in range(10)]
  rows = list(store.as_dataset(seed=1, epochs=2))
  order = [tokens.index(bytes(row["inputs"])) for row in rows]
  assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
  assert order[:10] != order[10:] != list(range(10))
  again = [tokens.index(bytes(row["inputs"])) for row in store.as_dataset(seed=1, epochs=2)]
  assert again == order
  endless = iter(store.as_dataset("plain", batch_size=3, seed=0, epochs=None))
  assert [next(endless)["inputs"].shape for _ in range(11)] == [(3, T)] * 11


def test_batches_for_the_fused_head(topk_store):
  batch = next(iter(topk_store.as_dataset("batch", batch_size=2)))
  assert isinstance(batch, dj.Batch)
  targets = batch.targets["teacher"]
  assert isinstance(targets, dj.losses.TopKTargets) and targets.missing_mass == "renormalise"
  np.testing.assert_array_equal(batch.labels_BT[1], topk_store.example(1)["targets"])
  np.testing.assert_array_equal(
    batch.inputs.positions_BT[1], topk_store.example(1)["inputs_position"]
  )


def test_a_store_at_a_url_is_read_where_it_is(whole, memory_store):
  store = pickle.loads(pickle.dumps(dj.open_store(memory_store)))
  assert store.folder == memory_store
  np.testing.assert_array_equal(store[9]["tokens_T"], sequence(9)["tokens_T"])
  here = dj.open_store(f"file://{whole}")
  assert here.folder == whole
  for form, size in (("plain", 4), ("maxtext", 4), ("plain", None), ("batch", 4)):
    options = {"batch_size": size, "seed": 2, "epochs": 3}
    for a, b in zip(*(s.as_dataset(form, **options) for s in (store, here)), strict=True):
      jax.tree.map(np.testing.assert_array_equal, a, b)


def test_formats_that_are_refused(whole):
  store = dj.open_store(whole)
  with pytest.raises(InputError, match="format is 'parquet'; expected one of plain, maxtext"):
    store.as_dataset("parquet")
  with pytest.raises(InputError, match="batch_size is None; expected a number for format='batch'"):
    store.as_dataset("batch")
  m = manifest(10, labels=True, format_version=2, shards=store.manifest.shards)
  task = dj.Store(store.folder, m)
  with pytest.raises(InputError, match="format is 'maxtext'; expected 'plain' for a store of a"):
    task.as_dataset("maxtext")


def test_tunix_is_named_where_it_is_missing(whole):
  code = f"""
    import sys
    sys.modules["tunix"] = None
    import distill_jax as dj
    try:
      dj.open_store({str(whole)!r}).as_dataset("tunix", batch_size=2)
    except dj.InputError as e:
      print(e)
  """
  command = [sys.executable, "-c", textwrap.dedent(code)]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert "pip install google-tunix" in done.stdout


def test_tunix_masks_tokens(whole):
  """The loss of Tunix at position t reads input_mask[t + 1]; ours is of the label of position t."""
  store = dj.open_store(whole)
  got, mask = formats.tunix_fields(store[0], store.manifest), store[0]["mask_T"]
  np.testing.assert_array_equal(got["input_mask"][1:], mask[:-1])
  assert not got["input_mask"][0]
  assert got["teacher_output"]["top_k_logits"].shape == (T, N)
