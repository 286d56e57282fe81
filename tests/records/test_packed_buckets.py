"""Packing of whole documents into rows of several lengths, in one pass over the corpus."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import packing_runs
import pytest
import tiny
from packing_runs import made, run, store_bytes

from distill_jax import config
from distill_jax.commands import pack
from distill_jax.data import corpus
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.errors import InputError
from distill_jax.models import loading
from distill_jax.records.store import open_store
from distill_jax.records.writer import Writer

SCRIPT = Path(packing_runs.__file__)
BUCKETS = {"seq_len": 128, "buckets": (32, 64, 128)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A corpus, and the bytes of its stores, which one process packs without a stop."""
  folder = tmp_path_factory.mktemp("buckets")
  text = " ".join(tiny.sentences(20))
  documents = [{"text": f"{i}: {text[i : i + 10 + 37 * i % 150]}"} for i in range(200)]
  path = folder / "corpus.jsonl"
  path.write_text("".join(json.dumps(document) + "\n" for document in documents))
  done = run(made(folder, path, **BUCKETS), folder / "packed")
  assert min(sequences_of(done).values()) > 8 and len(sequences_of(done)) == 3
  assert done["sequences"] == done["packed_now"] == sum(sequences_of(done).values())
  return folder, path, all_bytes(folder / "packed")


def sequences_of(done):
  """Returns the numbers of sequences by length, from the result of `pack`."""
  return {n: done[key] for n in BUCKETS["buckets"] if (key := f"{n}/sequences") in done}


def all_bytes(folder):
  """Returns the bytes of the stores of all lengths."""
  return {str(n): store_bytes(folder / str(n)) for n in BUCKETS["buckets"]}


def tokens_of(rows):
  """The documents in some rows, as a sorted list of tuples of tokens."""
  return sorted(
    tuple(row["tokens_T"][row["segments_T"] == s].tolist())
    for row in rows
    for s in range(1, row["segments_T"].max() + 1)
  )


def test_the_stores_hold_every_document_once(whole):
  folder, path, _ = whole
  stores = {n: open_store(folder / "packed" / str(n)) for n in BUCKETS["buckets"]}
  rows = [store[i] for store in stores.values() for i in range(len(store))]
  data = config.resolve(made(folder, path, **BUCKETS)).data
  in_one_length = list(corpus.sequences(data, load_tokenizer(data.tokenizer)))
  assert {len(row["tokens_T"]) for row in in_one_length} == {128}
  assert tokens_of(rows) == tokens_of(in_one_length)
  for n, store in stores.items():
    assert store.manifest.seq_len == n
    assert {len(store[i]["tokens_T"]) for i in range(len(store))} == {n}


@pytest.mark.parametrize("shards", [0, 2, 12])
def test_a_stopped_run_is_continued(whole, tmp_path, shards):
  _, path, want = whole
  c, packed = stop_after(shards, tmp_path, path, **BUCKETS)
  done = run(c, packed)
  assert done["packed_now"] < done["sequences"] or not shards
  assert all_bytes(packed) == want


def test_the_bytes_do_not_depend_on_the_number_of_processes(whole, tmp_path):
  _, path, want = whole
  run(made(tmp_path, path, **BUCKETS), tmp_path / "packed", workers=2)
  assert all_bytes(tmp_path / "packed") == want


@pytest.mark.slow
@pytest.mark.parametrize("workers, number, phase", [(1, 1, "after"), (2, 6, "before")])
def test_a_killed_run_is_continued_by_another_number_of_processes(
  whole, tmp_path, workers, number, phase
):
  _, path, want = whole
  words = [SCRIPT, tmp_path, path, workers, number, phase, json.dumps(BUCKETS)]
  tests = SCRIPT.parent
  env = {**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}"}
  command = [sys.executable, *map(str, words)]
  killed = subprocess.run(command, env=env, check=False, capture_output=True)
  assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
  done = run(made(tmp_path, path, **BUCKETS), tmp_path / "packed", 3 - workers)
  assert 0 < done["packed_now"] < done["sequences"]
  assert all_bytes(tmp_path / "packed") == want
  assert run(made(tmp_path, path, **BUCKETS), tmp_path / "packed")["packed_now"] == 0


def stop_after(shards, folder, path, **data):
  """Packs some shards and stops with an error; returns the config and the folder."""
  write, left = Writer.write_shard, itertools.count()

  def write_shard(self, rows, records):
    if next(left) == shards:
      raise InputError("stopped")
    return write(self, rows, records)

  c = made(folder, path, **data)
  with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="stopped"):
    patch.setattr(Writer, "write_shard", write_shard)
    run(c, folder / "packed")
  return c, folder / "packed"


def test_a_corpus_that_changed_in_the_first_window_is_refused(whole, tmp_path, monkeypatch):
  """The rows that are stored are compared, since no digest of blocks covers them."""
  monkeypatch.setattr(packing_runs, "WINDOW", 64)
  path = tmp_path / "corpus.jsonl"
  path.write_bytes(Path(whole[1]).read_bytes())
  c, packed = stop_after(1, tmp_path, path, seq_len=32, whole=True)
  text = path.read_text()
  assert json.loads((packed / "packing" / "000000016.json").read_text())["rows"] == []
  path.write_text(text.replace("2: ", "3: ", 1))
  with pytest.raises(InputError, match=r"has changed since its first 16 sequences were packed"):
    run(c, packed)


def test_other_lengths_are_refused_in_the_same_folder(whole, tmp_path):
  c, packed = stop_after(2, tmp_path, whole[1], **BUCKETS)
  c.data.buckets = (64, 128)
  with pytest.raises(InputError, match=r"was packed with lengths=\[32, 64, 128\], but this run"):
    run(c, packed)


def test_a_longer_limit_extends_the_stores(whole, tmp_path):
  folder, path, _ = whole
  totals = []
  for limit in (3, 9):
    done = run(made(tmp_path, path, sequences=limit, **BUCKETS), tmp_path / "packed")
    held = sum(n * rows for n, rows in sequences_of(done).items())
    assert (limit - 1) * 128 < held <= limit * 128
    totals.append(sequences_of(done))
    again = run(made(tmp_path, path, sequences=limit, **BUCKETS), tmp_path / "packed")
    assert again == {**done, "packed_now": 0}
  assert totals[0] != totals[1]
  for n, rows in totals[1].items():
    ours, all_rows = (open_store(f / "packed" / str(n)) for f in (tmp_path, folder))
    for i in range(rows):
      np.testing.assert_array_equal(ours[i]["tokens_T"], all_rows[i]["tokens_T"])
  with pytest.raises(InputError, match="Stores can only be extended"):
    run(made(tmp_path, path, sequences=5, **BUCKETS), tmp_path / "packed")


def test_a_length_without_documents_has_no_store(tmp_path, capsys):
  path = tmp_path / "corpus.jsonl"
  path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(50)))
  done = run(made(tmp_path, path, **BUCKETS), tmp_path / "packed")
  assert list(sequences_of(done)) == [32]
  assert "No document needs sequences of [64, 128] tokens" in capsys.readouterr().err
  assert run(made(tmp_path, path, **BUCKETS), tmp_path / "packed")["packed_now"] == 0


def test_rows_of_a_packed_store_are_opened_by_length(whole, tmp_path):
  folder, path, _ = whole
  c = made(tmp_path, path, packed=str(folder / "packed"), **BUCKETS)
  teacher = loading.open_source(config.resolve(c).teacher)
  rows_of, _ = pack.open_rows(config.resolve(c), teacher, tmp_path)
  held = sum(n * len(rows) for n, rows in rows_of.items())
  assert {n: len(rows_of[n][0]["tokens_T"]) for n in rows_of} == {32: 32, 64: 64, 128: 128}
  c.data.sequences = held // 128 // 2
  half, _ = pack.open_rows(config.resolve(c), teacher, tmp_path)
  assert all(abs(len(half[n]) - len(rows_of[n]) / 2) <= 1 for n in rows_of)
  c.data.packed = str(tmp_path)
  with pytest.raises(InputError, match=r"data.buckets is \(32, 64, 128\); expected the lengths of"):
    pack.open_rows(config.resolve(c), teacher, tmp_path)
