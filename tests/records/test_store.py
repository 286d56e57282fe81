"""Tests of reading a store: with distill_jax, tfds and grain."""

import json
import pickle
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
from tiny_store import N, T, V, manifest, record, same, sequence

from distill_jax.errors import InputError
from distill_jax.records import store, tf_example
from distill_jax.records.manifest import NAME, shard_name

pytestmark = pytest.mark.smoke


def test_the_cost_of_reading_a_record_does_not_depend_on_the_number_of_shards(whole, monkeypatch):
  """The tag and spec of the manifest are computed once per store."""
  s = store.open_store(whole)
  s[0]
  monkeypatch.setattr(store.Manifest, "identity", property(lambda m: pytest.fail("asked again")))
  for i in range(len(s)):
    same(s[i], i)


def test_read(whole):
  s = store.open_store(whole, {"tokenizer": "tok", "vocab_size": V, "teacher": "abc"})
  assert len(s) == 10
  for i in (0, 2, 3, 9):
    same(s[i], i)
  with pytest.raises(IndexError):
    s[10]
  seen = []
  s.verify(lambda done, total: seen.append((done, total)))
  assert seen == [(i + 1, 10) for i in range(10)]
  m = s.manifest
  assert [x.name for x in m.shards] == [shard_name(i) for i in range(4)]
  assert sum(x.tokens for x in m.shards) == sum(x.targets for x in m.shards) == 10 * (T - 4)


def test_pickle_and_threads(whole):
  s = pickle.loads(pickle.dumps(store.open_store(whole)))
  errors = []

  def work(k):
    try:
      for i in range(k, 50):
        same(s[i * 7 % 10], i * 7 % 10)
    except AssertionError as e:
      errors.append(e)

  threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
  for t in threads:
    t.start()
  for t in threads:
    t.join()
  assert not errors


def test_tfds_reads_it_without_tensorflow(whole):
  code = f"""
    import sys
    import tensorflow_datasets as tfds
    from distill_jax.records import tf_example, manifest
    builder = tfds.builder_from_directory({str(whole)!r})
    source = builder.as_data_source(split="records")
    m = manifest.load({str(whole)!r})
    seqs = [tf_example.decode(i, source[i], m) for i in range(len(source))]
    assert len(seqs) == 10
    assert "float16" in builder.info.features["scalars"].doc.desc
    assert "tensorflow" not in sys.modules
    print(int(seqs[9]["tokens_T"].sum()))
  """
  out = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
  )
  assert int(out.stdout.split()[-1]) == sequence(9)["tokens_T"].sum()


def test_grain_reads_it(whole):
  import grain.python as grain

  m = store.open_store(whole).manifest
  source = grain.ArrayRecordDataSource([str(whole / s.name) for s in m.shards])
  assert len(source) == 10
  same(tf_example.decode(7, tf_example.parse(source[7]), m), 7)
  data = grain.MapDataset.source(store.open_store(whole)).shuffle(seed=1).batch(2)
  assert data[0]["ids_TK"].shape == (2, T, N)


@pytest.mark.parametrize(
  "change",
  [
    {"kind": "text", "n": 0},
    {"kind": "labels", "n": 0, "format_version": 3},
    {"kind": "topk", "missing_mass": "tail_bucket"},
    {"logp": True},
    {"taps": store.Taps((0, 1), 8, 3)},
    {"entropy": False},
  ],
  ids=str,
)
def test_every_kind(tmp_path, change):
  m = manifest(2, **change)

  def seq(i):
    rng = np.random.default_rng(i)
    s = sequence(i)
    s["ids_TN"] = np.sort(rng.random((T, V)).argsort(1)[:, :N], 1)
    s["logp_TN"] = -rng.random((T, N)) - 1
    s["taps_PTD"] = rng.integers(-127, 128, (2, T, 8)).astype(np.int8)
    s["taps_scale_PT"] = rng.random((2, T)).astype(np.float32)
    return s

  record(tmp_path, m, make=seq)
  s = store.open_store(tmp_path)
  s.verify()
  got, want = s[1], seq(1)
  assert ("ids_TK" in got) == (m.kind not in ("text", "labels"))
  if m.spec.has_logp:
    keep = want["mask_T"]
    np.testing.assert_allclose(got["logp_TK"][keep], want["logp_TN"][keep], atol=2e-3)
  if m.taps:
    keep = want["segments_T"] > 0
    np.testing.assert_array_equal(got["taps_PTD"][:, keep], want["taps_PTD"][:, keep])
  assert ("entropy_T" in got) == (m.kind != "text" and m.entropy)


def test_labels_of_a_task(tmp_path):
  """Labels are not tokens, and do not have segments."""

  def example(i):
    row = sequence(i)
    row["labels_T"] = row.pop("tokens_T")
    del row["segments_T"]
    return row

  m = manifest(2, tokenizer="", labels=True, format_version=2)
  with store.Writer(tmp_path, m) as w:
    w.write_shard(range(2), map(example, range(2)))
    done = w.complete()
  assert done.shards[0].tokens == 2 * T
  read = store.open_store(tmp_path)
  read.verify()
  assert read.manifest == done
  np.testing.assert_array_equal(read[1]["labels_T"], sequence(1)["tokens_T"])
  np.testing.assert_array_equal(read[1]["mask_T"], sequence(1)["mask_T"])
  assert not {"tokens_T", "segments_T"} & set(read[1])


def test_format_1_of_text_and_of_a_task_is_read(tmp_path):
  """Format 1 stores labels of a task as tokens; a missing tokenizer identifies them."""
  text, task = tmp_path / "text", tmp_path / "task"
  record(text)
  record(task, manifest(tokenizer=""))
  for folder in (text, task):
    fields = json.loads((folder / NAME).read_text())
    assert fields["format_version"] == 1
    assert "labels" not in fields
  same(store.open_store(text)[4], 4)
  read = store.open_store(task)
  read.verify()
  assert read.manifest.labels
  np.testing.assert_array_equal(read[4]["labels_T"], sequence(4)["tokens_T"])
  np.testing.assert_array_equal(read[4]["mask_T"], sequence(4)["mask_T"])
  assert not {"tokens_T", "segments_T"} & set(read[4])
  with pytest.raises(InputError, match="of format 1, but this run writes format 2"):
    record(task, manifest(tokenizer="", labels=True, format_version=2))


def test_the_kind_of_taps_is_named_of_in_the_file(tmp_path):
  m = manifest(2, taps=store.Taps((1,), 8, None, "qkv"))
  m.save(tmp_path)
  assert json.loads((tmp_path / NAME).read_text())["taps"]["of"] == "qkv"
  assert store.manifest_lib.load(tmp_path) == m
