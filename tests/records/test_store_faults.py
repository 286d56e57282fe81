"""Tests of errors for damaged stores and stores of other runs."""

import json
import shutil

import numpy as np
import pytest
from tiny_store import N, V, contents, manifest, record, same

from distill_jax.errors import InputError
from distill_jax.records import shard_index, shards, store
from distill_jax.records.manifest import NAME, shard_name
from distill_jax.runtime import files

pytestmark = pytest.mark.smoke


def refused(folder, *words, expect=None, read=False):
  with pytest.raises(InputError) as e:
    s = store.open_store(folder, expect)
    if read:
      for i in range(len(s)):
        s[i]
  for word in words:
    assert word in str(e.value)


def test_a_flipped_byte_in_the_data_is_detected(copy):
  path = copy / shard_name(1)
  data = bytearray(path.read_bytes())
  used = len(bytes(data).rstrip(b"\0"))
  found = 0
  for at in range(100, used, used // 12):
    bad = bytearray(data)
    bad[at] ^= 0x10
    path.write_bytes(bad)
    with pytest.raises(InputError, match=path.name):
      store.open_store(copy).verify()
    found += 1
    try:  # either reading fails, or the byte was not part of a record
      s = store.open_store(copy)
      for i in range(3, 6):
        same(s[i], i)
    except InputError as e:
      assert path.name in str(e)  # noqa: PT017
  assert found > 10


def test_records_of_one_label_take_a_few_dozen_bytes(tmp_path):
  """Many records share a chunk, but each is read alone, and a flipped byte is detected."""
  rng = np.random.default_rng(0)
  labels, logits = rng.integers(0, 10, 3000), rng.normal(size=(3000, 10)).astype(np.float32)
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))

  def one(i):
    order = np.argsort(-logp[i]).astype(np.int32)
    return {
      "tokens_T": labels[i : i + 1].astype(np.int32),
      "segments_T": np.ones(1, np.int32),
      "mask_T": np.ones(1, bool),
      "ids_TN": order[None],
      "logp_TN": logp[i][order][None],
      "argmax_T": order[:1],
      "label_logp_T": logp[i, labels[i : i + 1]],
      "entropy_T": -np.sum(np.exp(logp[i]) * logp[i], keepdims=True),
    }

  kind = {"kind": "topk", "n": 10, "vocab_size": 10, "seq_len": 1, "missing_mass": "renormalise"}
  about = manifest(3000, logp=True, sequences_per_shard=3000, **kind)
  with store.Writer(tmp_path, about) as w:
    w.write_shard(range(3000), map(one, range(3000)))
    done = w.complete()
  assert done.shards[0].bytes < 100 * 3000  # log-probabilities of random logits take 20 of them
  read = store.open_store(tmp_path)
  for i in rng.permutation(3000)[:100]:
    got = read[int(i)]
    assert got["tokens_T"] == labels[i]
    # The rounding error of float16 below 8 is 2^-9.
    np.testing.assert_allclose(got["logp_TK"][0], logp[i][got["ids_TK"][0]], atol=2e-3)
  path = tmp_path / shard_name(0)
  data = bytearray(path.read_bytes())
  data[len(data) // 3] ^= 1
  path.write_bytes(data)
  refused(tmp_path, path.name, read=True)


def test_truncated_empty_and_missing_shards_are_refused(copy):
  path = copy / shard_name(2)
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])
  refused(copy, path.name, f"{len(data) // 2} bytes", str(len(data)))
  path.write_bytes(b"")
  refused(copy, path.name, "0 bytes")
  path.write_bytes(bytes(len(data)))
  refused(copy, path.name, "damaged at record 6", read=True)
  path.unlink()
  refused(copy, path.name, "missing")


def put(source, number, folder, name):
  """Copies a shard and its index into another folder."""
  shutil.copy(source / shard_name(number), folder / name)
  index_of = shard_index.name_of
  shutil.copy(source / index_of(shard_name(number)), folder / index_of(name))


def test_a_shard_of_another_store_with_the_right_name_is_refused(copy, tmp_path):
  other, name = tmp_path / "other", shard_name(1)
  record(other, manifest(corpus="another"))
  shutil.copy(other / name, copy / name)
  refused(copy, name, "damaged at record 3", "differs from the index", read=True)
  put(other, 1, copy, name)
  refused(copy, name, "the tag", "expected", read=True)
  with pytest.raises(InputError, match="digest"):
    store.open_store(copy).verify()
  put(copy, 0, copy, name)  # a shard of this store under another name
  refused(copy, name, "the index 0", "expected 3", read=True)
  with pytest.raises(InputError, match=f"{name} is damaged at record 4 .*the index 1"):
    store.open_store(copy).read_many([0, 9, 4, 1])  # decoded at once


def test_a_damaged_index_is_named_and_a_missing_one_is_made_from_the_shard(copy):
  path = copy / shard_index.name_of(shard_name(1))
  good = path.read_bytes()
  for bad in (good[:-1], b"", good + b"x", good[:-1] + bytes([good[-1] ^ 1])):
    path.write_bytes(bad)
    refused(copy, path.name, "inspect --workdir", read=True)
  path.unlink()
  s = store.open_store(copy)
  for i in range(10):
    same(s[i], i)
  assert not path.exists()  # readers do not write
  shard = copy / shard_name(1)
  data = bytearray(shard.read_bytes())
  data[2000] ^= 1
  shard.write_bytes(data)
  refused(copy, shard.name, "is damaged", read=True)


def test_a_store_of_an_earlier_version_at_a_url_needs_inspect_once(memory_store):
  files.remove(files.join(memory_store, shard_index.name_of(shard_name(2))))
  refused(
    memory_store, "records-00002.array_record has no index", f"inspect --workdir={memory_store}"
  )
  m = store.manifest_lib.load(memory_store)
  assert shards.write_missing_indices(memory_store, m) == 1
  same(store.open_store(memory_store)[7], 7)
  assert shards.write_missing_indices(memory_store, m) == 0


@pytest.mark.parametrize(
  ("expect", "words"),
  [
    ({"tokenizer": "other"}, ("tokenizer='tok'", "'other'")),
    ({"vocab_size": 7}, (f"vocab_size={V}", "7")),
    ({"teacher": "xyz"}, ("'abc'", "'xyz'")),
    ({"nonsense": 1}, ("nonsense",)),
  ],
)
def test_a_store_that_does_not_match_expect_is_refused(whole, expect, words):
  refused(whole, *words, expect=expect)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"tokenizer": "x"}, "tokenizer='tok', but this run has tokenizer='x'"),
    ({"n": 7}, f"n={N}, but this run has n=7"),
    ({"teacher": {"name": "t", "config": {"layers": 2}, "digest": "q"}}, "teacher.digest='abc'"),
  ],
)
def test_recording_into_a_folder_with_other_settings_is_refused(copy, change, words):
  before = contents(copy)
  with pytest.raises(InputError, match=words):
    record(copy, manifest(**change))
  assert contents(copy) == before


def test_missing_and_damaged_manifests_are_refused(copy, tmp_path):
  refused(tmp_path / "nowhere", "nowhere is empty or does not exist. Name a folder that")
  refused(tmp_path / "heldout", "does not exist. Set records.heldout_sequences and record again")
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "file").touch()
  refused(tmp_path / "other", "other has no manifest.json. Name a folder that `record` finished")
  text = (copy / NAME).read_text()
  for bad, word in [
    (text[: len(text) // 2], "cannot be read"),
    ("[]", "format None"),
    (text.replace('"format_version": 1', '"format_version": 99'), "format 99"),
    (text.replace('"corpus"', '"corpse"'), "corpse"),
  ]:
    (copy / NAME).write_text(bad)
    refused(copy, NAME, word)
    with pytest.raises(InputError, match=NAME):
      record(copy)


def test_invalid_manifest_fields_are_refused():
  for change, word in [
    ({"kind": "topk"}, "tail_bucket"),
    ({"missing_mass": "renormalise"}, "none"),
    ({"temperature": 0.0}, "records.temperature is 0.0; expected a number above 0"),
    ({"kind": "topk", "missing_mass": "renormalise", "temperature": 2.0}, "temperature"),
    (
      {"kind": "dense", "missing_mass": "renormalise"},
      f"n is {N}; expected {V}, the number of classes, for kind 'dense'",
    ),
    ({"kind": "dense", "n": V}, "expected 'renormalise' for kind 'dense'"),
    (
      {"kind": "dense", "n": V, "missing_mass": "renormalise", "temperature": 2.0},
      "expected 1 for kind 'dense'",
    ),
    ({"extents": ()}, r"extents is \(\); expected numbers of sequences of at least 1"),
  ]:
    with pytest.raises(InputError, match=word):
      manifest(**change)
  assert json.loads(json.dumps(manifest().identity)) == manifest().identity
