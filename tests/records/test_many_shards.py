"""A store has more shards than a process may have open files; `ulimit -n` runs out elsewhere."""

import dataclasses
import hashlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import slow
from array_record.python import array_record_module
from tiny_store import manifest, record, sequence

from distill_jax.records import shard_index, shard_writer, store, tf_example
from distill_jax.records.manifest import Shard, shard_name
from distill_jax.records.shards import OPEN_SHARDS


def short_sequence(i):
  return {name: x[:4] for name, x in sequence(i).items()}


def many_shards(folder, count):
  """Writes a store of one record per shard, as holes where a shard has zeros."""
  m = manifest(count, sequences_per_shard=1)
  shards, part = [], folder / "part"
  for i in range(count):
    record_i = tf_example.encode(i, sequence(i), m)
    out = array_record_module.ArrayRecordWriter(
      str(part), shard_writer.array_record_options(m.seq_len)
    )
    out.write(tf_example.serialize(record_i))
    out.close()
    name, data = shard_name(i), part.read_bytes()
    index = shard_index.to_bytes(shard_index.build(part, 1))
    (folder / shard_index.name_of(name)).write_bytes(index)
    with (folder / name).open("wb") as f:
      for at in range(0, len(data), shard_index.BLOCK):
        f.seek(at)
        f.write(data[at : at + shard_index.BLOCK].rstrip(b"\0"))
      f.truncate(len(data))
    shards.append(Shard(name, i, 1, len(data), hashlib.sha256(data).hexdigest(), 28, 28, 0, {}))
  part.unlink()
  dataclasses.replace(m, shards=tuple(shards)).save(folder)


READ = """
  import resource
  import sys
  import numpy as np

  folder, limit, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
  from distill_jax.records.store import open_store
  from distill_jax.training import loader

  resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
  store = open_store(folder)
  tokens = [store[int(i)]["tokens_T"] for i in np.random.default_rng(0).permutation(count)]
  batches = loader.batches([store], batch_size=20, seed=0)
  rows = np.concatenate([next(batches).inputs.tokens_BT for _ in range(count // 20)])
  assert len(np.unique(rows, axis=0)) == len(np.unique(tokens, axis=0)) == count
  store.verify()
"""


def run(code, *args):
  command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
  return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("shards", "limit"), [(200, 64), slow.param(5000, 256)])
def test_more_shards_than_files_may_be_open(tmp_path, shards, limit):
  many_shards(tmp_path, shards)
  done = run(READ, tmp_path, limit, shards)
  assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("memory", [0, 2**12, 2**27])
def test_a_batch_of_short_records_opens_each_shard_once(tmp_path, monkeypatch, memory):
  monkeypatch.setattr("distill_jax.records.shards.MEMORY", memory)
  shards, each = 2 * OPEN_SHARDS, 3
  m = manifest(shards * each, seq_len=4)
  record(tmp_path, m, make=short_sequence)
  opened, open_shard = [], shard_index.open_shard

  def count(path, *args):
    opened.append(path.name)
    return open_shard(path, *args)

  monkeypatch.setattr(shard_index, "open_shard", count)
  order = np.random.default_rng(0).permutation(shards * each)
  opened_store = store.open_store(tmp_path)
  rows = opened_store.read_many(list(order))
  assert len(opened) == len(set(opened)) == shards
  again = opened_store.read_many(list(order))
  if memory == 2**27:
    assert len(opened) == shards  # all are in memory
  np.testing.assert_array_equal(
    [row["tokens_T"] for row in again], [row["tokens_T"] for row in rows]
  )
  np.testing.assert_array_equal(
    [row["tokens_T"] for row in rows], [short_sequence(i)["tokens_T"] for i in order]
  )


EXHAUST = """
  import os
  import resource
  import sys

  from distill_jax.records.store import open_store

  store = open_store(sys.argv[1])
  resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
  try:
    while True:
      os.open("/", os.O_RDONLY)
  except OSError:
    pass
  try:
    store[5]
  except Exception as e:
    print(type(e).__name__, e)
"""


@pytest.mark.parametrize("has_index", [True, False])
@pytest.mark.parametrize("seq_len", [4, 32])
def test_too_many_open_files_is_called_that(tmp_path, seq_len, has_index):
  make = short_sequence if seq_len == 4 else sequence
  record(tmp_path, manifest(10, seq_len=seq_len), make=make)
  if not has_index:
    for path in tmp_path.glob("*.index"):
      path.unlink()
  found = run(EXHAUST, tmp_path).stdout
  assert found.startswith(f"InputError {tmp_path}/records-00001."), found
  assert "too many files are open. Raise the limit with `ulimit -n`." in found
  assert "elete" not in found
