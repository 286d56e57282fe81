"""Tests of writing a store: several processes, resuming, extending, kills, and errors."""

import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tiny_store import contents, manifest, record, same, sequence

from distill_jax.errors import InputError
from distill_jax.records import store, tf_example
from distill_jax.records.manifest import shard_name


def test_several_processes_write_the_same_bytes_as_one(whole, tmp_path):
  for index in (2, 0, 1):
    with store.Writer(tmp_path, manifest(), index, 3) as w:
      for r in w.manifest.ranges[index::3]:
        w.write_shard(r, map(sequence, r))
      done = w.complete()
    assert (done is not None) == (index == 1)
  assert contents(tmp_path) == contents(whole)


def test_resuming_writes_only_missing_shards(whole, tmp_path):
  assert record(tmp_path, shards=2) == [range(3), range(3, 6)]
  before = (tmp_path / shard_name(0)).stat().st_mtime_ns
  with pytest.raises(InputError, match="0 of 4 shards"):
    store.open_store(tmp_path)
  assert record(tmp_path) == [range(6, 9), range(9, 10)]
  assert (tmp_path / shard_name(0)).stat().st_mtime_ns == before
  assert contents(tmp_path) == contents(whole)
  assert record(tmp_path) == []
  assert contents(tmp_path) == contents(whole)


def test_only_missing_and_damaged_shards_are_written_again(whole, copy):
  (copy / shard_name(1)).unlink()
  (copy / shard_name(3)).write_bytes(b"cut")
  assert record(copy) == [range(3, 6), range(9, 10)]
  assert contents(copy) == contents(whole)


def test_extending_keeps_finished_shards(copy):
  before = contents(copy)
  assert record(copy, manifest(17)) == [range(10, 13), range(13, 16), range(16, 17)]
  after = contents(copy)
  assert all(after[n] == b for n, b in before.items() if n.startswith("records-"))
  s = store.open_store(copy)
  assert len(s) == 17
  for i in (9, 10, 16):
    same(s[i], i)
  import tensorflow_datasets as tfds

  source = tfds.builder_from_directory(str(copy)).as_data_source(split="records")
  assert len(source) == 17
  same(tf_example.decode(16, source[16], s.manifest), 16)
  with pytest.raises(InputError, match="holds 17 sequences, but this run records 10"):
    record(copy)


KILL = """
  import os, signal, sys
  sys.path[:0] = [{tests!r}, {root!r}]
  from pathlib import Path
  import tiny_store
  from distill_jax.runtime import atomic_io
  from distill_jax.records import shard_writer
  countdown = {at}
  def maybe_die(fn):
    def wrapped(*a, **k):
      global countdown
      countdown -= 1
      if countdown < 0:
        os.kill(os.getpid(), signal.SIGKILL)
      return fn(*a, **k)
    return wrapped
  # All points at which the folder changes.
  shard_writer.tf_example.encode = maybe_die(shard_writer.tf_example.encode)
  shard_writer.digest = maybe_die(shard_writer.digest)
  Path.replace = maybe_die(Path.replace)
  Path.unlink = maybe_die(Path.unlink)
  atomic_io.fsync_dir = maybe_die(atomic_io.fsync_dir)
  tiny_store.record({folder!r})
"""


@pytest.mark.parametrize("at", [0, 1, 2, 4, 7, 8, 9, 10, 11, 12, 20, 30, 36, 39, 41])
def test_a_killed_writer_resumes_to_the_same_bytes(whole, tmp_path, at):
  tests = Path(__file__).parents[1]
  code = KILL.format(at=at, folder=str(tmp_path), tests=str(tests), root=str(tests.parent))
  died = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True)
  assert died.returncode == -signal.SIGKILL
  finished = list(tmp_path.glob("*.array_record.json"))
  stamps = {p: p.with_suffix("").stat().st_mtime_ns for p in finished}
  todo = record(tmp_path)
  assert len(todo) == 4 - len(finished)
  assert all(p.with_suffix("").stat().st_mtime_ns == s for p, s in stamps.items())
  assert contents(tmp_path) == contents(whole)
  assert not list(tmp_path.glob(".writing-*"))
  store.open_store(tmp_path).verify()


def test_a_full_disk_is_reported_and_finished_shards_are_kept(whole, tmp_path):
  """A limit on file size replaces a full disk: the same calls raise the same error."""
  record(tmp_path, shards=1)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  for limit in (1000, 70_000):  # in the first block; while the footer is written
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
      with pytest.raises(InputError, match=rf"{shard_name(1)} cannot be written .*too large"):
        record(tmp_path)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert not (tmp_path / shard_name(1)).exists()
  assert len(record(tmp_path)) == 3
  assert contents(tmp_path) == contents(whole)


def test_two_writers_with_the_same_shards_are_refused(tmp_path):
  with store.Writer(tmp_path, manifest()) as first:
    with pytest.raises(InputError, match=f"being written by process {os.getpid()}"):
      store.Writer(tmp_path, manifest())
    # With another process count the lock differs, so the conflict is found at the end of a shard.
    with store.Writer(tmp_path, manifest(), 0, 2) as second:
      r = first.missing()[0]
      first.write_shard(r, map(sequence, r))
      before = contents(tmp_path)
      second.write_shard(r, map(sequence, r))  # the same bytes: harmless
      assert contents(tmp_path) == before
      with pytest.raises(InputError, match="finished by another writer"):
        second.write_shard(r, (sequence(i + 1) for i in r))
      assert contents(tmp_path) == before
  assert len(record(tmp_path)) == 3


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
  (tmp_path / "file").write_text("mine")
  for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/records")):
    with pytest.raises(InputError, match="cannot be written"):
      record(folder)
  assert (tmp_path / "file").read_text() == "mine"


def test_a_read_only_mount_is_refused(tmp_path):
  """A read-only mount in a private namespace is used, because root ignores mode bits."""
  script = f"mount -t tmpfs -o ro none {tmp_path} && exec {sys.executable} -c "
  tests = Path(__file__).parents[1]
  code = f"import sys; sys.path[:0] = [{str(tests)!r}, {str(tests.parent)!r}]\n"
  code += f"import tiny_store\ntiny_store.record({str(tmp_path / 's')!r})"
  if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
    pytest.skip("no private mounts here")
  out = subprocess.run(
    ["unshare", "-m", "sh", "-c", script + '"$0"', code], capture_output=True, text=True
  )
  if "mount" in out.stderr and "denied" in out.stderr:
    pytest.skip("no mounts here")
  assert out.returncode == 1
  assert "Read-only file system" in out.stderr.strip().splitlines()[-1]


def test_records_that_do_not_fit_the_shard_are_refused(tmp_path):
  with store.Writer(tmp_path, manifest()) as w:
    r = w.missing()[0]
    with pytest.raises(InputError, match="got 2 records; expected 3"):
      w.write_shard(r, map(sequence, range(2)))
    with pytest.raises(InputError, match="got more than 3 records"):
      w.write_shard(r, map(sequence, range(4)))
    with pytest.raises(InputError, match="is not a shard"):
      w.write_shard(range(1, 4), map(sequence, range(3)))
    short = {k: v[:5] for k, v in sequence(0).items()}
    with pytest.raises(InputError, match="5 tokens; expected 32"):
      w.write_shard(r, [short])
    assert w.missing()[0] == r
