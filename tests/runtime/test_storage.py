"""Tests of remote folders, with fsspec's memory file system and file:// as buckets."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import tiny

from distill_jax.errors import InputError
from distill_jax.records.store import open_store
from distill_jax.runtime import storage
from distill_jax.training.metric_writer import read_metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """Returns an empty bucket, with an empty local cache."""
  monkeypatch.setenv("DISTILL_JAX_CACHE", str(tmp_path / "cache"))
  fs = fsspec.filesystem("memory")
  fs.rm("/", recursive=True) if fs.find("/") else None
  return fs


def test_a_published_folder_is_fetched_on_another_machine(bucket, tmp_path, monkeypatch):
  url = "memory://bucket/run"
  with storage.Synced(url) as here:
    (here / "config.json").write_text("{}")
    (here / "sub").mkdir()
    (here / "sub" / "x.array_record").write_bytes(os.urandom(100))
    (here / ".lock").write_text("1")
    (here / "checkpoints").mkdir()
    (here / "checkpoints" / "a").write_text("by orbax")
    assert storage.remote_of(here) == url
  names = {p.removeprefix("/bucket/run/") for p in bucket.find("/bucket")}
  assert names == {"config.json", "sub/x.array_record"}
  monkeypatch.setenv("DISTILL_JAX_CACHE", str(tmp_path / "another"))
  there = storage.fetch(url)
  assert there != here
  assert (there / "sub/x.array_record").read_bytes() == (here / "sub/x.array_record").read_bytes()


def test_fetched_files_are_not_published_again(bucket):
  """A file that another process has rewritten in the meantime is not overwritten."""
  with bucket.open("/bucket/run/metrics.jsonl", "w") as f:
    f.write("old")
  with storage.Synced("memory://bucket/run") as here:
    assert (here / "metrics.jsonl").read_text() == "old"
    with bucket.open("/bucket/run/metrics.jsonl", "w") as f:
      f.write("new, by the first process")
  assert bucket.cat("/bucket/run/metrics.jsonl") == b"new, by the first process"


def test_finished_files_are_published_during_the_work(bucket, monkeypatch):
  monkeypatch.setattr(storage, "PUBLISH_EVERY", 0.01)
  with storage.Synced("memory://bucket/run") as here:
    (here / "shard").write_bytes(b"1")
    for _ in range(500):
      if bucket.exists("/bucket/run/shard") and bucket.cat("/bucket/run/shard"):
        break  # the file exists, empty, before it is written
      storage.threading.Event().wait(0.01)
    assert bucket.cat("/bucket/run/shard") == b"1"


def test_files_written_before_an_error_are_published(bucket):
  with pytest.raises(KeyError), storage.Synced("memory://bucket/run") as here:
    (here / "shard").write_bytes(b"1")
    raise KeyError
  assert bucket.cat("/bucket/run/shard") == b"1"


def test_an_address_that_cannot_be_opened_is_refused(bucket):
  with pytest.raises(InputError, match="fsspec does not know the file system 'nowhere'"):
    storage.fetch("nowhere://bucket/run")
  assert storage.mirror("plain/path") == Path("plain/path")
  assert storage.fetch("plain/path") == Path("plain/path")


CONFIG = """
import pathlib, sys
sys.path.insert(0, {tests!r})
import tiny
def get_config():
  c = tiny.tiny(pathlib.Path({folder!r}))
  c.teacher.source = ""
  c.train.records = ("file://{bucket}/records",)
  return c
"""


@pytest.mark.slow
def test_a_run_resumes_on_another_machine(tmp_path):
  """Records, checkpoints and metrics are only in the bucket; each verb runs on another machine."""
  bucket = tmp_path / "bucket"
  bucket.mkdir()
  text = CONFIG.format(tests=str(ROOT / "tests"), folder=str(tmp_path), bucket=bucket)
  (tmp_path / "config.py").write_text(text)

  def verb(name, workdir, *flags):
    cache = tmp_path / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    line = [
      sys.executable,
      "-m",
      "distill_jax.cli",
      name,
      f"--config={tmp_path / 'config.py'}",
      f"--workdir=file://{bucket}/{workdir}",
      *flags,
    ]
    env = os.environ | {"DISTILL_JAX_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=env, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout

  verb("record", "records")
  assert len(open_store(bucket / "records")) == 20
  (bucket / "records" / "records-00001.array_record").unlink()
  assert '"recorded_now": 6' in verb("record", "records", "--json")
  verb("train", "run")
  assert [row["step"] for row in read_metrics(bucket / "run")] == list(range(6))
  # The state after a machine was lost at step 4.
  shutil.rmtree(bucket / "run" / "checkpoints" / "6")
  before = tiny.measured(bucket / "run")
  verb("train", "run")
  assert tiny.measured(bucket / "run") == before
  assert sorted(p.name for p in (bucket / "run" / "checkpoints").iterdir()) == ["4", "6"]
  verb("export", "run", f"--config.export.dir=file://{bucket}/export")
  assert (bucket / "export" / "model.safetensors").is_file()
