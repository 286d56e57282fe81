"""Tests of remote folders, with fsspec's memory file system and file:// as buckets."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
import tiny

from distill_jax.errors import InputError, Unavailable
from distill_jax.records.store import open_store
from distill_jax.runtime import distributed, files, mirror, storage
from distill_jax.training.metric_writer import read_metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """Returns an empty bucket, with an empty local cache."""
  monkeypatch.setenv("DISTILL_JAX_CACHE", str(tmp_path / "cache"))
  fs = fsspec.filesystem("memory")
  fs.rm("/", recursive=True) if fs.find("/") else None
  return fs


def names(bucket, folder):
  """Returns the names of the files below a folder, except hidden ones."""
  paths = (p.removeprefix(f"/{folder}/") for p in bucket.find(f"/{folder}"))
  return {path for path in paths if not path.startswith(".")}


def test_a_mirror_is_published_and_read_on_another_machine(bucket, tmp_path, monkeypatch):
  url = "memory://bucket/run"
  with storage.Synced(url) as here:
    (here / "config.json").write_text("{}")
    (here / "sub").mkdir()
    (here / "sub" / "x.json").write_bytes(os.urandom(100))
    (here / ".lock").write_text("1")
    (here / "checkpoints").mkdir()
    (here / "checkpoints" / "a").write_text("by orbax")
    assert storage.remote_of(here) == url
    assert storage.remote_of(here / "sub") == storage.location(here / "sub") == f"{url}/sub"
    assert storage.checkpoints(here / "link" / "run") == f"{url}/link/run/checkpoints"
    assert storage.run_folder(f"{url}/sub") == here / "sub"  # not yet published
  assert names(bucket, "bucket/run") == {"config.json", "sub/x.json"}
  monkeypatch.setenv("DISTILL_JAX_CACHE", str(tmp_path / "another"))
  with storage.Synced(url) as there:
    assert there != here
    assert (there / "sub/x.json").read_bytes() == (here / "sub/x.json").read_bytes()
  copy = storage.run_folder(url)
  assert copy not in (here, there)
  assert (copy / "config.json").read_text() == "{}"


def test_fetched_files_are_not_published_again(bucket):
  """A file that another process has rewritten in the meantime is not overwritten."""
  with bucket.open("/bucket/run/metrics.jsonl", "w") as f:
    f.write("old")
  with storage.Synced("memory://bucket/run") as here:
    assert (here / "metrics.jsonl").read_text() == "old"
    with bucket.open("/bucket/run/metrics.jsonl", "w") as f:
      f.write("new, by the first process")
  assert bucket.cat("/bucket/run/metrics.jsonl") == b"new, by the first process"


def test_only_small_files_are_copied_at_the_start(bucket):
  """Not copied: large files, the 5,000 notes of a store, checkpoints, hidden files."""
  for name in (
    "small",
    "records/records-00001.array_record.json",
    "checkpoints/1/a",
    ".jax_cache/b",
  ):
    bucket.pipe(f"/bucket/run/{name}", b"x")
  bucket.pipe("/bucket/run/sub/large", b"x" * mirror.SMALL)
  with storage.Synced("memory://bucket/run") as here:
    assert {p.name for p in here.rglob("*") if p.is_file()} == {"small", mirror.REMOTE}
    assert storage.fetched(here / "sub" / "large").stat().st_size == mirror.SMALL
    assert not storage.fetched(here / "sub" / "other").exists()
  assert "sub/large" in names(bucket, "bucket/run")


def test_what_was_deleted_does_not_come_back(bucket):
  """Deletions in the mirror are repeated at the URL; the mirror of a killed run does not count."""
  url = "memory://bucket/run"
  with storage.Synced(url) as here:
    for name in ("stays", "deleted", "sub/deleted"):
      (here / name).parent.mkdir(exist_ok=True)
      (here / name).write_text("1")
  with storage.Synced(url) as here:
    (here / "deleted").unlink()
    shutil.rmtree(here / "sub")
  assert names(bucket, "bucket/run") == {"stays"}
  (here / "left by kill -9").write_text("1")
  bucket.rm("/bucket/run", recursive=True)
  with storage.Synced(url) as here:
    assert {p.name for p in here.iterdir()} == {mirror.REMOTE}
  assert not bucket.exists("/bucket/run")


def test_a_mirror_that_is_deleted_during_a_run_deletes_nothing_at_the_url(bucket):
  """For example, the user empties the cache."""
  url = "memory://bucket/run"
  with (
    pytest.raises(InputError, match="was deleted during the run.*Run the same command again"),
    storage.Synced(url) as here,
  ):
    (here / "config.json").write_text("{}")
    mirror.synced_of(here / "config.json").publish()
    shutil.rmtree(here)
  assert names(bucket, "bucket/run") == {"config.json"}


def test_finished_files_are_published_during_the_work(bucket, monkeypatch):
  monkeypatch.setattr(mirror, "PUBLISH_EVERY", 0.01)
  with storage.Synced("memory://bucket/run") as here:
    (here / "file").write_bytes(b"1")
    for _ in range(500):
      if bucket.exists("/bucket/run/file") and bucket.cat("/bucket/run/file"):
        break  # the file exists, empty, before it is written
      time.sleep(0.01)
    assert bucket.cat("/bucket/run/file") == b"1"


def test_a_growing_file_is_copied_at_a_bounded_rate(bucket, monkeypatch):
  with storage.Synced("memory://bucket/run") as here:
    monkeypatch.setattr(mirror, "PUBLISHED_BYTES", 10)
    (synced,) = mirror._OPEN.values()
    for size in (100, 200):
      (here / "log").write_bytes(b"x" * size)
      synced.publish()
      assert len(bucket.cat("/bucket/run/log")) == 100  # 200 bytes are due ten seconds later
  assert len(bucket.cat("/bucket/run/log")) == 200


def test_a_finished_file_is_handed_over(bucket, tmp_path):
  with storage.Synced("memory://bucket/run") as here:
    (here / "samples").mkdir()
    (here / "samples" / "0.jsonl").write_text("{}")
    (synced,) = mirror._OPEN.values()
    synced.publish()  # while it grows
    at = storage.hand_over(here / "samples" / "0.jsonl")
    assert at == "memory://bucket/run/samples/0.jsonl"
    assert not (here / "samples" / "0.jsonl").exists()
    synced.publish()
  assert bucket.cat("/bucket/run/samples/0.jsonl") == b"{}"
  (tmp_path / "local").write_text("1")
  assert storage.hand_over(tmp_path / "local") == str(tmp_path / "local")
  assert (tmp_path / "local").exists()


def test_a_failure_of_publishing_stops_the_run_and_is_raised_at_its_end(
  bucket, monkeypatch, capsys
):
  def fails(*_):
    raise Unavailable("the store is down.")

  monkeypatch.setattr(mirror, "PUBLISH_EVERY", 0.01)
  with (
    pytest.raises(Unavailable, match="down"),
    storage.Synced("memory://bucket/run") as here,
    distributed.Preemption() as preemption,
  ):
    assert not preemption.reached()
    monkeypatch.setattr(mirror.files, "write", fails)
    (here / "file").write_text("1")
    deadline = time.monotonic() + 20
    while not preemption.reached():
      assert time.monotonic() < deadline
      time.sleep(0.01)
  assert "memory://bucket/run is not up to date: the store is down." in capsys.readouterr().err
  with pytest.raises(KeyError), storage.Synced("memory://bucket/run") as here:
    (here / "file").write_text("1")
    raise KeyError  # counts more than the failure of publishing


def test_files_that_vanish_are_no_error(bucket, monkeypatch):
  """Deleted by their program after the folder was listed, or at the URL after the listing."""
  bucket.pipe("/bucket/run/here", b"1")
  tree = files.tree
  monkeypatch.setattr(files, "tree", lambda *args: tree(*args) | {"gone": files.FileInfo(1, "")})
  with storage.Synced("memory://bucket/run") as here:
    assert not (here / "gone").exists()
    (synced,) = mirror._OPEN.values()
    found = [*mirror._files(here), (here / "vanished", (1, 1))]
    monkeypatch.setattr(mirror, "_files", lambda _: found)
    synced.publish()


def test_a_folder_in_use_is_refused(bucket):
  with storage.Synced("memory://bucket/run"):
    with pytest.raises(InputError, match="memory://bucket/run is in use by another process"):
      storage.Synced("memory://bucket/run").__enter__()
    with storage.Synced("memory://bucket/run/sub") as below:
      assert storage.remote_of(below) == "memory://bucket/run/sub"


def test_files_written_before_an_error_are_published(bucket):
  with pytest.raises(KeyError), storage.Synced("memory://bucket/run") as here:
    (here / "file").write_bytes(b"1")
    raise KeyError
  assert bucket.cat("/bucket/run/file") == b"1"


def test_the_times_of_other_hosts_do_not_matter(tmp_path, monkeypatch):
  monkeypatch.setenv("DISTILL_JAX_CACHE", str(tmp_path / "cache"))
  bucket = tmp_path / "bucket"
  bucket.mkdir()
  for year, name in ((0, "old"), (2**32, "new")):
    (bucket / name).write_text("remote")
    os.utime(bucket / name, (year, year))
  with storage.Synced(f"file://{bucket}") as here:
    assert (here / "old").read_text() == (here / "new").read_text() == "remote"
    os.utime(here / "new", (2**31, 2**31))
    (here / "new").write_text("changed")
    os.utime(here / "new", (1, 1))
  assert (bucket / "old").read_text() == "remote"
  assert (bucket / "new").read_text() == "changed"


def test_an_address_that_cannot_be_opened_is_refused(bucket):
  with pytest.raises(InputError, match="fsspec does not know this file system"):
    storage.Synced("nowhere://bucket/run").__enter__()
  with storage.Synced("plain/path") as path:
    assert path == Path("plain/path") == storage.run_folder("plain/path")


@pytest.mark.slow
def test_a_run_resumes_on_another_machine(tmp_path):
  """Records, checkpoints and metrics are only in the bucket; each verb runs on another machine."""
  bucket = tmp_path / "bucket"
  bucket.mkdir()
  changes = ['c.teacher.source = ""', f"c.train.records = ('file://{bucket}/records',)"]
  config = tiny.write_config(tmp_path / "config.py", tmp_path, *changes)

  def verb(name, workdir, *flags):
    cache = tmp_path / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    line = [
      sys.executable,
      "-m",
      "distill_jax.cli",
      name,
      f"--config={config}",
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
