"""Tests of the first seconds of a run: a workdir that all processes see, and that no other uses."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
from local_stores import free_port

from distill_jax.errors import InputError, Unavailable
from distill_jax.records.store import open_store
from distill_jax.runtime import claim, distributed, files, mirror, storage
from distill_jax.runtime.claim import claimed
from distill_jax.training.metric_writer import read_metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture
def url(tmp_path, monkeypatch):
  monkeypatch.setenv("DISTILL_JAX_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(claim, "BEAT", 0.1)
  monkeypatch.setattr(claim, "WATCH", 1.0)
  return f"file://{tmp_path / 'bucket'}"


def left_behind(url):
  """Writes the lease of a run that was killed."""
  files.write(
    files.join(url, claim.LEASE), json.dumps({"run": "x", "by": "process 1 of a"}).encode()
  )


def leases(url):
  return set(files.listing(url, ".run*"))


def wait_for(is_true):
  deadline = time.monotonic() + 20
  while not is_true():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_a_second_run_at_a_url_is_refused_while_the_first_is_alive(url, capsys):
  with claimed(url):
    with pytest.raises(InputError, match=f"{url} is in use by process {os.getpid()} of .* Wait"):
      claimed(url).__enter__()
    assert "Whether that run is alive is known in 1 s." in capsys.readouterr().err
  assert files.info(files.join(url, claim.LEASE)) is None
  with claimed(url):
    pass


def test_the_lease_of_a_killed_run_is_taken(url):
  left_behind(url)
  with claimed(url):
    assert json.loads(files.read(files.join(url, claim.LEASE)))["run"] != "x"


def test_a_run_that_ends_while_it_is_watched_is_told(url):
  """The mirror of the new run would be of the time before its last files."""
  left_behind(url)
  threading.Timer(0.2, files.remove, [files.join(url, claim.LEASE)]).start()
  with pytest.raises(Unavailable, match="has just ended"):
    claimed(url).__enter__()


def test_a_run_whose_lease_was_taken_publishes_nothing_more_and_stops(url, tmp_path, capsys):
  with claimed(url), storage.Synced(url) as folder, distributed.Preemption() as preemption:
    # It is written again and again, because a beat that has begun replaces it.
    wait_for(lambda: left_behind(url) or preemption.reached())
    (folder / "late").write_text("1")
  assert f"Another run has taken {url}. This run stops." in capsys.readouterr().err
  assert files.info(files.join(url, "late")) is None
  assert json.loads(files.read(files.join(url, claim.LEASE)))["run"] == "x"
  assert not mirror._OPEN


def test_a_loss_that_is_noticed_before_the_work_begins_stops_it(url, capsys):
  with claimed(url):
    # E.g. while weights are read.
    wait_for(lambda: left_behind(url) or "This run stops." in capsys.readouterr().err)
    with storage.Synced(url) as folder, distributed.Preemption() as preemption:
      wait_for(preemption.reached)
      (folder / "late").write_text("1")
  assert files.info(files.join(url, "late")) is None


def test_parts_share_a_url_but_not_with_the_whole(url):
  with claimed(url, "-0-2"), claimed(url, "-1-2"):
    for part in ("", "-1-2"):
      with pytest.raises(InputError, match="is in use by process"):
        claimed(url, part).__enter__()
  with claimed(url), pytest.raises(InputError, match="is in use by process"):
    claimed(url, "-1-2").__enter__()
  assert not leases(url)


@pytest.mark.parametrize(("killed", "part"), [("-0-2", ""), ("", "-0-2")])
def test_the_lease_of_a_killed_part_or_whole_is_taken(url, killed, part, capsys):
  """The killed run, which may only have been silent, finds that its lease is gone, and stops."""
  monitor = claim._Lease(url, killed)
  monitor._write()
  with claimed(url, part):
    assert leases(url) == {claim.LEASE + part}
    monitor._thread.start()
    wait_for(lambda: "This run stops." in capsys.readouterr().err)
    monitor.release()
    assert leases(url) == {claim.LEASE + part}


def test_a_part_that_begins_with_the_whole_at_the_same_time_stops(url, monkeypatch, capsys):
  part = claim._Lease(url, "-0-2")
  part.take()
  whole = claim._Lease(url, "")
  monkeypatch.setattr(whole, "_excluding", dict)  # neither has seen the other
  whole.take()
  wait_for(lambda: "This run stops." in capsys.readouterr().err)
  part.release()
  assert leases(url) == {claim.LEASE}
  whole.release()


def processes(tmp_path, workdirs, verb="record", flags=()):
  """Runs a command in two processes, each with its own folders; returns codes and outputs."""
  config = tiny.write_config(tmp_path / "config.py", tmp_path, 'c.teacher.source = ""')
  port = free_port()
  started = []
  for i, workdir in enumerate(workdirs):
    (home := tmp_path / f"host{i}").mkdir(exist_ok=True)
    line = [sys.executable, "-m", "distill_jax.cli", verb, f"--config={config}", "--json", *flags]
    line += [f"--workdir={workdir}", f"--distributed=localhost:{port},{len(workdirs)},{i}"]
    env = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": "2",
      "DISTILL_JAX_CACHE": str(home / "cache"),
      "PYTHONPATH": str(ROOT),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started.append(subprocess.Popen(line, env=env, cwd=home, **pipes))
  outputs = [process.communicate(timeout=240)[0] for process in started]
  return [process.returncode for process in started], outputs


@pytest.mark.slow
def test_a_workdir_that_not_all_processes_see_is_refused_at_once(tmp_path):
  codes, outputs = processes(tmp_path, ["runs/x", "runs/x"])  # each in its own folder
  assert codes == [2, 2], outputs
  for output in outputs:
    last = [line for line in output.splitlines() if line.startswith("error")]
    assert last == [
      "error: --workdir is 'runs/x'; expected a URL, or a folder on a disk that all 2 processes "
      "share, but what process 0 writes there is not seen by process 1. Name such a folder."
    ]
  assert not list(tmp_path.glob("host*/runs/x/*"))
  assert not list(tmp_path.glob("host*/runs/x/.*"))


@pytest.mark.slow
def test_two_hosts_with_private_disks_share_a_url(tmp_path):
  """Each has its own mirror; a resumed run, with one shard deleted, records that shard alone."""
  bucket = f"file://{tmp_path / 'bucket'}"
  config = ["--config.records.tokens_per_shard=128", f"--config.train.records=('{bucket}/r',)"]
  for now in (20, 4, 0):
    codes, outputs = processes(tmp_path, [f"{bucket}/r"] * 2, "record", config)
    assert codes == [0, 0], outputs
    assert f'"recorded_now": {now}' in "".join(outputs)
    if now == 20:
      (tmp_path / "bucket" / "r" / "records-00001.array_record").unlink()
  on_hosts = [p for p in tmp_path.glob("host*/**/*") if "array_record" in p.name]
  assert not on_hosts
  assert len(open_store(f"{bucket}/r")) == 20
  codes, outputs = processes(tmp_path, [f"{bucket}/t"] * 2, "train", config)
  assert codes == [0, 0], outputs
  assert [row["step"] for row in read_metrics(tmp_path / "bucket" / "t")] == list(range(6))
