"""Tests of stores at URLs: what is requested and read, and what faults do."""

from urllib.parse import unquote

import numpy as np
import pytest
from array_record.python import array_record_module
from object_stores import upload
from tiny_store import manifest, record, same, sequence

from distill_jax.errors import InputError
from distill_jax.records import shard_index, shards, store
from distill_jax.records.manifest import shard_name
from distill_jax.runtime import files
from distill_jax.training import loader

T, ROWS, SHARD = 4096, 48, 8


def text(i):
  tokens = np.random.default_rng(i).integers(0, 50_000, T).astype(np.int32)
  return {"tokens_T": tokens, "segments_T": np.ones(T, np.int32), "mask_T": np.ones(T, bool)}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
  """A local store of long texts."""
  folder = tmp_path_factory.mktemp("texts")
  m = manifest(ROWS, kind="text", n=0, vocab_size=50_000, seq_len=T, sequences_per_shard=SHARD)
  record(folder, m, make=text)
  return folder


def sizes(folder):
  """Returns the bytes of all records."""
  readers = map(array_record_module.ArrayRecordReader, map(str, folder.glob("*.array_record")))
  return sum(len(data) for reader in readers for data in reader.read_all())


def test_training_reads_its_rows_and_little_else(texts, object_store):
  url, proxy = upload(texts, object_store.url), object_store.proxy
  proxy.requests.clear()
  opened = store.open_store(url)
  assert len(proxy.requests) <= 5  # the manifest and one listing
  held = np.array([0, 2])  # one of two processes
  batches = loader.batches([opened], batch_size=4, seed=0, held=lambda _: held)
  seen = [next(batches) for _ in range(ROWS // 4)]
  rows = np.concatenate([b.inputs.tokens_BT for b in seen])
  here = loader.batches([store.open_store(texts)], batch_size=4, seed=0, held=lambda _: held)
  np.testing.assert_array_equal(
    rows, np.concatenate([next(here).inputs.tokens_BT for _ in range(ROWS // 4)])
  )
  ahead = (loader.THREADS + loader.BATCHES_AHEAD) * len(held) / ROWS
  assert proxy.read_bytes <= 1.5 * sizes(texts) * (0.5 + ahead)
  requests = [unquote(r.path.partition("?")[0]).rpartition("/")[2] for r in proxy.requests]
  indices = [r for r in requests if r.endswith(".index")]
  assert len(indices) == len(set(indices)) == ROWS // SHARD  # each is read once
  records = [r for r in requests if r.endswith(".array_record")]
  assert len(rows) <= len(records) <= len(rows) * (1 + 2 * ahead) + 1


def test_a_store_of_very_many_records_does_not_keep_indices(texts, s3, monkeypatch):
  url, proxy = upload(texts, s3.url), s3.proxy
  monkeypatch.setattr(shards, "INDEXED_RECORDS", ROWS - 1)
  opened = store.open_store(url)
  proxy.requests.clear()
  for _ in range(2):
    for i, row in zip((3, 40, 9), opened.read_many([3, 40, 9]), strict=True):
      np.testing.assert_array_equal(row["tokens_T"], text(i)["tokens_T"])
  sizes_read = [r.read_bytes for r in proxy.requests if r.path.endswith(".index")]
  assert sizes_read == [16] * 6  # the entries alone
  here = store.open_store(texts)
  np.testing.assert_array_equal(here[40]["tokens_T"], text(40)["tokens_T"])


def test_a_busy_store_and_lost_connections_delay_a_batch_and_do_not_change_it(texts, s3, capfd):
  url, failed = upload(texts, s3.url), []

  def fault(method, path):
    if path.endswith(".array_record") and len(failed) < 4:
      failed.append(path)
      return (503, "reset", "reset_response", 503)[len(failed) - 1]
    return None

  opened = store.open_store(url)
  s3.proxy.fault = fault
  rows = opened.read_many(range(0, ROWS, 5))
  for i, row in zip(range(0, ROWS, 5), rows, strict=True):
    np.testing.assert_array_equal(row["tokens_T"], text(i)["tokens_T"])
  assert len(failed) == 4


def test_a_flipped_byte_names_shard_and_record(texts, s3):
  url, name = upload(texts, s3.url), shard_name(2)
  entries = shard_index.parse((texts / shard_index.name_of(name)).read_bytes(), SHARD)
  data = bytearray((texts / name).read_bytes())
  data[int(entries[3]["offset"]) + 1000] ^= 1
  files.write(files.join(url, name), bytes(data))
  opened = store.open_store(url)
  opened[18]
  with pytest.raises(InputError, match=f"{url}/{name} is damaged at record 19 .The checksum"):
    opened.read_many([3, 19])
  with pytest.raises(InputError, match=f"{url}/{name} has digest"):
    opened.verify()


def test_shards_of_labels_are_copied_once(tmp_path, s3):
  """Short records share chunks, so whole shards are read; they are small."""
  m = manifest(30, seq_len=4, sequences_per_shard=5)
  record(tmp_path, m, make=lambda i: {name: x[:4] for name, x in sequence(i).items()})
  assert not list(tmp_path.glob("*.index"))
  opened, proxy = store.open_store(upload(tmp_path, s3.url)), s3.proxy
  proxy.requests.clear()
  for _ in range(2):
    for i in np.random.default_rng(0).permutation(30):
      np.testing.assert_array_equal(opened[i]["tokens_T"], sequence(i)["tokens_T"][:4])
  gets = [r.path for r in proxy.requests if r.method == "GET"]
  assert len(gets) == len(set(gets)) == 6


def test_a_store_that_is_not_there_is_named(s3, tmp_path):
  with pytest.raises(InputError, match=f"{s3.url}/no is empty or does not exist. Name a folder"):
    store.open_store(f"{s3.url}/no")
  record(tmp_path)
  url = upload(tmp_path, s3.url)
  same(store.open_store(url)[9], 9)
  files.remove(files.join(url, shard_name(1)))
  with pytest.raises(InputError, match="records-00001.array_record is missing. Run `record` again"):
    store.open_store(url)
