"""Stores of held-out rows, which `record` and `pack` make with those of the training rows."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import heldout_runs
import object_stores
import pytest
import slow
from heldout_runs import HELDOUT, ROWS, made, run
from tiny_store import contents

from distill_jax import config
from distill_jax.commands import inspect, pack
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.errors import InputError, Preempted
from distill_jax.records.shard_buffer import ShardBuffer
from distill_jax.records.store import open_store
from distill_jax.runtime import files, storage

SCRIPT = Path(heldout_runs.__file__)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
  """The folder of a training and a held-out store that one command records."""
  folder = tmp_path_factory.mktemp("both")
  done = run(made(folder), folder / "records")
  assert done["sequences"] == done["recorded_now"] == ROWS
  assert done["heldout/sequences"] == done["heldout/recorded_now"] == HELDOUT
  return folder


def same(folder, want):
  """Asserts that two folders hold the same training and held-out stores, byte for byte."""
  for name in ("", "heldout"):
    assert contents(folder / name) == contents(want / name)


def test_the_stores_are_those_of_two_commands(both, tmp_path):
  c = made(tmp_path, heldout=0)
  assert "heldout/sequences" not in run(c, tmp_path / "train")
  c.data.split, c.data.sequences = "heldout", HELDOUT
  run(c, tmp_path / "heldout")
  assert contents(tmp_path / "train") == contents(both / "records")
  assert contents(tmp_path / "heldout") == contents(both / "records" / "heldout")


def test_sigterm_in_the_last_batch_of_a_store_stops_before_the_next_store(
  both, tmp_path, monkeypatch
):
  add, full = ShardBuffer.add, []

  def add_and_signal(self, records):
    add(self, records)
    if not self.unfinished:
      full.append(self)
      signal.raise_signal(signal.SIGTERM)

  c = made(tmp_path)
  with monkeypatch.context() as patched:
    patched.setattr(ShardBuffer, "add", add_and_signal)
    with pytest.raises(Preempted, match="finished shards are kept"):
      run(c, tmp_path / "records")
  assert len(full) == 1
  run(c, tmp_path / "records")
  same(tmp_path / "records", both / "records")


def test_both_stores_are_described(both):
  found = inspect.run(config.resolve(made(both)), both / "records")
  assert (found["sequences"], found["heldout/sequences"]) == (ROWS, HELDOUT)
  assert found["heldout/heldout_fraction"] == 0.3 and "heldout_fraction" not in found
  alone = inspect.run(config.resolve(made(both)), both / "records" / "heldout")
  assert alone == {
    k.removeprefix("heldout/"): v for k, v in found.items() if k.startswith("heldout/")
  }


def test_no_document_is_in_both_stores(both):
  decode = load_tokenizer(both / "tokenizer.json").decode
  stores = [open_store(both / "records" / name) for name in ("", "heldout")]
  train, heldout = (
    {m for row in store for m in re.findall(r"<\d+>", decode(row["tokens_T"].tolist()))}
    for store in ([s[i] for i in range(len(s))] for s in stores)
  )
  assert len(train) > 10 and len(heldout) > 3 and not train & heldout
  assert [s.manifest.heldout_fraction for s in stores] == [0, 0.3]
  assert stores[0].manifest.corpus != stores[1].manifest.corpus


@pytest.mark.parametrize(
  "shard, missing",
  [(6, (2, ROWS)), slow.param(8, (0, 14))],
)
def test_a_killed_command_is_continued(both, tmp_path, shard, missing):
  """Shards 0 to 5 are packed; 6 and 7 are held-out records, 8 to 11 are training records."""
  tests = SCRIPT.parent
  env = {**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}"}
  command = [sys.executable, str(SCRIPT), str(tmp_path), str(shard)]
  killed = subprocess.run(command, env=env, check=False, capture_output=True)
  assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
  done = run(made(tmp_path), tmp_path / "records")
  assert (done["heldout/recorded_now"], done["recorded_now"]) == missing
  same(tmp_path / "records", both / "records")


def test_held_out_rows_are_added_to_a_finished_store(both, tmp_path):
  run(made(tmp_path, heldout=0), tmp_path / "records")
  for heldout, now in ((6, 6), (HELDOUT, 2)):
    done = run(made(tmp_path, heldout), tmp_path / "records")
    assert (done["heldout/recorded_now"], done["recorded_now"]) == (now, 0)
  ours, want = (open_store(f / "records" / "heldout") for f in (tmp_path, both))
  assert [s.sha256 for s in ours.manifest.shards] == [s.sha256 for s in want.manifest.shards]


def test_record_reads_packed_text_of_both_splits(both, tmp_path):
  c = made(tmp_path)
  done = pack.run(config.resolve(c), tmp_path / "packed")
  assert done["heldout/packed_now"] == HELDOUT
  c.data.packed, c.data.path = str(tmp_path / "packed"), "not read"
  run(c, tmp_path / "records")
  same(tmp_path / "records", both / "records")
  files.remove_tree(str(tmp_path / "packed" / "heldout"))
  with pytest.raises(InputError, match="packed/heldout is empty or does not exist. Set records"):
    run(c, tmp_path / "again")
  c.data.packed, c.records.heldout_sequences = str(both / "records/packed/heldout"), 0
  with pytest.raises(InputError, match=r"has heldout_fraction=0.3, but this run has 0"):
    run(c, tmp_path / "again")


def test_text_is_stored_at_a_url(both, tmp_path, monkeypatch):
  monkeypatch.setenv("DISTILL_JAX_CACHE", str(tmp_path / "cache"))
  c = made(tmp_path)
  c.records.kind = "text"
  with storage.Synced("memory://heldout/text") as folder:
    run(c, folder)
    assert run(c, folder)["heldout/recorded_now"] == 0
  for name in ("", "/heldout"):
    assert open_store(f"memory://heldout/text{name}").manifest.digest == (
      open_store(f"{both}/records/packed{name}").manifest.digest
    )
  files.remove_tree("memory://heldout/text")


CONFIG = """
import pathlib, sys
sys.path.insert(0, {tests!r})
import heldout_runs
def get_config():
  return heldout_runs.made(pathlib.Path({folder!r}))
"""


@pytest.mark.slow
def test_two_processes_record_both_stores_at_a_url(both, tmp_path, s3):
  """Each process writes one of the two shards of the held-out store."""
  file = tmp_path / "config.py"
  file.write_text(CONFIG.format(tests=str(SCRIPT.parent), folder=str(tmp_path)))
  line = [sys.executable, "launch/local.py", "--processes=2", "--devices=2", "--", "record"]
  line += [f"--config={file}", f"--workdir={s3.url}/records"]
  env = os.environ | s3.environment() | {"DISTILL_JAX_CACHE": str(tmp_path / "cache")}
  for _ in range(2):  # the second time, nothing is missing
    done = subprocess.run(
      line, cwd=SCRIPT.parents[1], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
  for name in ("", "/heldout"):
    want = contents(Path(f"{both}/records{name}"))
    found = object_stores.contents(f"{s3.url}/records{name}")
    assert {key: found[key] for key in want} == want


@pytest.mark.parametrize(
  "changes, why",
  [
    ({"records.heldout_sequences": -1}, "records.heldout_sequences is -1; expected at least 0"),
    ({"records.logprobs": "dump.jsonl"}, "expected 0 with records.logprobs, because"),
    ({"data.split": "heldout"}, "data.split is 'heldout'; expected a split to train on"),
    ({"data.heldout_fraction": 0.0}, "expected 0 with data.heldout_fraction=0, which puts every"),
  ],
)
def test_bad_input(tmp_path, changes, why):
  c = made(tmp_path)
  c.update_from_flattened_dict(changes)
  for command in (run, lambda c, folder: pack.run(config.resolve(c), folder)):
    with pytest.raises(InputError, match=why):
      command(c, tmp_path / "records")
