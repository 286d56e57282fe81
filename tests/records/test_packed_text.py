"""Packing: the same bytes for any number of processes and after any stop; a changed corpus."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import packing_runs
import pytest
import slow
import tiny
from packing_runs import SHARD, made, run, store_bytes, write_corpus

from distill_jax import config
from distill_jax.commands import record
from distill_jax.data import block_tokenizer, corpus, sources
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.errors import InputError, Preempted
from distill_jax.records import collate
from distill_jax.records.store import open_store
from distill_jax.records.writer import Writer
from distill_jax.runtime import distributed, files, storage

SCRIPT = Path(packing_runs.__file__)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A corpus and the store of it that one process packs without a stop."""
  folder = tmp_path_factory.mktemp("whole")
  path = write_corpus(folder / "corpus.jsonl")
  done = run(made(folder, path), folder / "packed")
  assert done["packed_now"] == done["sequences"] > 200
  return folder, path, store_bytes(folder / "packed")


def stopped_after(shards, monkeypatch):
  """Makes packing stop with an error after some shards."""
  write, left = Writer.write_shard, [shards]

  def write_shard(self, rows, records):
    if not left[0]:
      raise InputError("stopped")
    left[0] -= 1
    return write(self, rows, records)

  monkeypatch.setattr(Writer, "write_shard", write_shard)


def pack_partly(folder, path, shards=3, **data):
  """Packs some shards and stops; returns the config and the folder of the store."""
  c, packed = made(folder, path, **data), folder / "packed"
  with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="stopped"):
    stopped_after(shards, patch)
    run(c, packed)
  return c, packed


def test_the_rows_are_those_of_the_corpus_in_order(whole):
  folder, path, _ = whole
  data = config.resolve(made(folder, path)).data
  rows = list(corpus.sequences(data, load_tokenizer(data.tokenizer)))
  store = open_store(folder / "packed")
  assert len(store) == len(rows)
  for i, row in enumerate(rows):
    assert all(np.array_equal(store[i][name], row[name]) for name in row)


@pytest.mark.parametrize("workers", [2, 3])
def test_the_bytes_do_not_depend_on_the_number_of_processes(whole, tmp_path, workers):
  _, path, want = whole
  run(made(tmp_path, path), tmp_path / "packed", workers)
  assert store_bytes(tmp_path / "packed") == want


def test_recording_text_writes_the_same_store(whole, tmp_path):
  _, path, want = whole
  c = made(tmp_path, path)
  c.records.kind = "text"
  done = record.run(config.resolve(c), tmp_path / "text")
  assert store_bytes(tmp_path / "text") == want
  assert record.run(config.resolve(c), tmp_path / "text") == {**done, "recorded_now": 0}


@pytest.mark.parametrize("workers, number, phase", [(1, 2, "after"), slow.param(2, 4, "before")])
def test_a_killed_run_is_continued_by_another_number_of_processes(
  whole, tmp_path, workers, number, phase
):
  _, path, want = whole
  command = [sys.executable, SCRIPT, tmp_path, path, workers, number, phase, "{}"]
  tests = SCRIPT.parent
  env = {**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}"}
  killed = subprocess.run([str(x) for x in command], env=env, check=False, capture_output=True)
  assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
  finished = number + (phase == "after")
  done = run(made(tmp_path, path), tmp_path / "packed", 3 - workers)
  assert done["packed_now"] == done["sequences"] - SHARD * finished
  assert store_bytes(tmp_path / "packed") == want


def test_a_resumed_run_reads_only_what_is_not_packed(whole, tmp_path, monkeypatch):
  _, path, want = whole
  c, packed = pack_partly(tmp_path, path, shards=6)
  read, blocks = [], sources.blocks
  monkeypatch.setattr(sources, "blocks", lambda *args: (read.append(b) or b for b in blocks(*args)))
  done = run(c, packed)
  missing = Path(path).stat().st_size * done["packed_now"] / done["sequences"]
  assert sum(len(b.content) for b in read) < missing + 3 * packing_runs.BLOCK
  assert store_bytes(packed) == want
  read.clear()
  assert run(c, packed)["packed_now"] == 0 and not read


def test_sigterm_keeps_the_finished_shards(whole, tmp_path, monkeypatch):
  _, path, want = whole
  rows = itertools.count(1)
  monkeypatch.setattr(distributed.Preemption, "reached", lambda self: next(rows) == 2 * SHARD + 5)
  with pytest.raises(Preempted, match="finished shards are kept"):
    run(made(tmp_path, path), tmp_path / "packed")
  monkeypatch.undo()
  done = run(made(tmp_path, path), tmp_path / "packed")
  assert done["packed_now"] == done["sequences"] - 2 * SHARD
  assert store_bytes(tmp_path / "packed") == want


def test_a_corpus_that_has_changed_is_refused(whole, tmp_path):
  text = Path(whole[1]).read_text()
  path = tmp_path / "corpus.jsonl"
  path.write_text(text)
  c, packed = pack_partly(tmp_path, path)
  for other in (text.replace("1 times", "2 times", 1), "\n" + text, text[:500]):
    path.write_text(other)
    with pytest.raises(InputError, match="has changed since its first 48 sequences were packed"):
      run(c, packed)
  path.write_text(text)  # the same text with another time of change
  os.utime(path, (1, 1))
  run(c, packed)
  assert store_bytes(packed) == whole[2]
  path.write_text(text + '{"text": "one more"}\n')
  with pytest.raises(InputError, match=r"has changed since its first \d+ sequences were packed"):
    run(c, packed)


def test_a_moved_corpus_is_continued(whole, tmp_path):
  c, packed = pack_partly(tmp_path, whole[1])
  (tmp_path / "moved").mkdir()
  c.data.path = str(tmp_path / "moved" / "corpus.jsonl")
  Path(c.data.path).write_bytes(Path(whole[1]).read_bytes())
  run(c, packed)
  assert store_bytes(packed) == whole[2]


def test_other_settings_are_refused(whole, tmp_path):
  c, packed = pack_partly(tmp_path, whole[1])
  c.data.heldout_fraction = 0.5
  with pytest.raises(InputError, match=r"was packed with data.heldout_fraction=0.0, but this run"):
    run(c, packed)


def test_a_longer_limit_extends_the_store(whole, tmp_path):
  folder, path, _ = whole
  for limit, now in ((16, 16), (20, 4), (40, 20)):
    done = run(made(tmp_path, path, sequences=limit), tmp_path / "packed")
    assert (done["sequences"], done["packed_now"]) == (limit, now)
  ours, all_rows = open_store(tmp_path / "packed"), open_store(folder / "packed")
  assert all(np.array_equal(ours[i]["tokens_T"], all_rows[i]["tokens_T"]) for i in range(40))
  with pytest.raises(InputError, match="Stores can only be extended"):
    run(made(tmp_path, path, sequences=10), tmp_path / "packed")


def test_record_reads_a_packed_store(whole, tmp_path):
  """The records are those of the corpus that record packs itself, up to data.sequences."""
  folder, path, _ = whole
  c = made(tmp_path, path, sequences=20)
  record.run(config.resolve(c), tmp_path / "own")
  c.data.packed, c.data.path = str(folder / "packed"), "not read"
  record.run(config.resolve(c), tmp_path / "read")
  assert not (tmp_path / "read" / "packed").exists()
  assert store_bytes(tmp_path / "read") == store_bytes(tmp_path / "own")
  c.data.seq_len = 16
  with pytest.raises(InputError, match="has seq_len=32, but this run has 16"):
    record.run(config.resolve(c), tmp_path / "other")
  with pytest.raises(InputError, match="data.packed is .*; expected '' for `pack`"):
    run(c, tmp_path / "again")


def test_a_folder_of_text_files_is_continued_inside_it(tmp_path):
  (tmp_path / "texts").mkdir()
  for i in range(30):
    (tmp_path / "texts" / f"{i:02}.txt").write_text(" ".join(tiny.sentences(1 + i % 9)))
  c = made(tmp_path, tmp_path / "texts", kind="text")
  run(c, tmp_path / "whole")
  c, packed = pack_partly(tmp_path, tmp_path / "texts", kind="text")
  run(c, packed, 2)
  assert store_bytes(packed) == store_bytes(tmp_path / "whole")


def test_the_first_bad_document_in_order_is_the_error(whole, tmp_path):
  lines = Path(whole[1]).read_bytes().split(b"\n")
  lines[20], lines[40] = b'{"text": "\xff"}', b"{"
  (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines))
  for workers in (1, 2):
    with pytest.raises(InputError, match=r"bad.jsonl: Byte \d+ is 0xff, which is not UTF-8"):
      run(made(tmp_path, tmp_path / "bad.jsonl"), tmp_path / f"packed{workers}", workers)


@pytest.mark.parametrize("path, kind", [("memory://gone/a.jsonl", "jsonl"), ("gone", "text")])
def test_a_missing_corpus_is_an_error(tmp_path, path, kind):
  with pytest.raises(InputError, match=rf"{path} does not exist. Name a"):
    run(made(tmp_path, path, kind=kind), tmp_path / "packed")
  (tmp_path / "empty").mkdir()
  with pytest.raises(InputError, match="is a folder without .txt files"):
    run(made(tmp_path, tmp_path / "empty", kind="text"), tmp_path / "packed")


def test_a_killed_worker_is_reported(whole, monkeypatch):
  folder, path, _ = whole
  data = config.resolve(made(folder, path)).data
  work = corpus.block_tokenizer(data, load_tokenizer(data.tokenizer))
  monkeypatch.setattr(sources, "BLOCK_BYTES", packing_runs.BLOCK)
  blocks = block_tokenizer.tokenized(sources.blocks(work.source), work, 2)
  next(blocks)
  for process in multiprocessing.active_children():
    process.kill()
  with pytest.raises(InputError, match=r"was killed.*Lower pack\.workers"):
    list(blocks)


def test_workers_do_not_import_jax():
  code = "import sys, distill_jax.data.block_tokenizer; assert not {'jax', 'flax'} & {*sys.modules}"
  subprocess.run([sys.executable, "-c", code], check=True)


def test_a_corpus_and_its_tokenizer_are_read_from_an_object_store(whole, tmp_path, object_store):
  folder, path, _ = whole
  lines = Path(path).read_bytes().splitlines(keepends=True)
  (tmp_path / "corpus").mkdir()
  for name, part in (("a.jsonl", lines[:20]), ("b.jsonl", lines[20:])):
    (tmp_path / "corpus" / name).write_bytes(b"".join(part))
    files.write(f"{object_store.url}/corpus/{name}", b"".join(part))
  files.write(f"{object_store.url}/corpus/deeper/c.jsonl", b"not read")
  files.upload(folder / "tokenizer.json", f"{object_store.url}/t/tokenizer.json")
  run(made(tmp_path, tmp_path / "corpus"), tmp_path / "local")
  before = object_store.proxy.read_bytes
  c = made(tmp_path, f"{object_store.url}/corpus", tokenizer=f"{object_store.url}/t")
  run(c, tmp_path / "packed")
  assert store_bytes(tmp_path / "packed") == store_bytes(tmp_path / "local")
  size = sum(map(len, lines)) + (folder / "tokenizer.json").stat().st_size
  assert object_store.proxy.read_bytes - before < 1.5 * size + 20_000


def test_workers_read_text_files_from_an_object_store(tmp_path, object_store):
  (tmp_path / "texts").mkdir()
  for i in range(20):
    (tmp_path / "texts" / f"{i:02}.txt").write_text(" ".join(tiny.sentences(5 + i % 9)))
    files.upload(tmp_path / "texts" / f"{i:02}.txt", f"{object_store.url}/texts/{i:02}.txt")
  run(made(tmp_path, tmp_path / "texts", kind="text"), tmp_path / "local")
  run(made(tmp_path, f"{object_store.url}/texts", kind="text"), tmp_path / "packed", workers=2)
  assert store_bytes(tmp_path / "packed") == store_bytes(tmp_path / "local")


def test_a_store_at_a_url_is_continued_by_another_machine(whole, tmp_path, s3, monkeypatch):
  _, path, want = whole
  c = made(tmp_path, path)

  def on_machine(name):
    monkeypatch.setenv("DISTILL_JAX_CACHE", str(tmp_path / name))
    with storage.Synced(f"{s3.url}/packed") as folder:
      return run(c, folder)

  with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="stopped"):
    stopped_after(3, patch)
    on_machine("first")
  done = on_machine("second")
  assert done["packed_now"] == done["sequences"] - 3 * SHARD
  found = {name: files.read(f"{s3.url}/packed/{name}") for name in want}
  assert found == want


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
  """Ten times as many documents take as much memory, also when record's rows are opened."""
  tests = SCRIPT.parent
  env = {**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}"}
  peaks = []
  for documents in (20_000, 200_000):
    command = [sys.executable, SCRIPT, tmp_path / str(documents), documents]
    done = subprocess.run([str(x) for x in command], env=env, check=True, capture_output=True)
    peaks.append(int(done.stdout))
  assert peaks[1] < 1.1 * peaks[0], peaks


def test_held_out_text_is_batched_without_holding_it(whole):
  """The batches are those of all rows at once, and only one batch has been read."""
  store = open_store(whole[0] / "packed")
  all_rows, rows = store.read_many(range(10)), SimpleNamespace(size=4, held=np.array([1, 2]))
  read = []
  stream = collate.streamed_batches((read.append(row) or row for row in all_rows), rows)
  for n, want in enumerate(collate.padded_batches(all_rows, rows), 1):
    got = next(stream)
    assert len(read) == min(4 * n, 10)
    assert jax.tree.all(jax.tree.map(np.array_equal, got, want))
