"""Tests of writing a store to a URL: what is on disk, what is requested, and what faults do."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import object_stores
import pytest
import slow
from tiny_store import contents, manifest, record, sequence

from distill_jax.errors import InputError, Unavailable
from distill_jax.records import store
from distill_jax.records.manifest import NAME, shard_name
from distill_jax.runtime import files, retries, storage
from distill_jax.runtime.claim import claimed

TESTS = Path(__file__).parents[1]
SHARD = 3  # records per shard of the tiny store


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("DISTILL_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def url(object_store):
  return f"{object_store.url}/records"


@pytest.fixture
def s3_url(s3):
  return f"{s3.url}/records"


def record_at(url, *args):
  with storage.Synced(url) as folder:
    return record(folder, *args)


def on_disk(folder):
  return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def count(proxy, word, method="GET"):
  return sum(r.method == method and word in r.path for r in proxy.requests)


def test_shards_are_uploaded_when_they_finish_and_leave_the_disk(whole, url, object_store):
  proxy, requests = object_store.proxy, []
  with storage.Synced(url) as folder, store.Writer(folder, manifest(60)) as w:
    todo = w.missing()
    assert len(todo) == 20
    for r in todo:
      before = len(proxy.requests)
      w.write_shard(r, map(sequence, r))
      requests.append(len(proxy.requests) - before)
      assert on_disk(folder) < 1000  # a shard has 131 kB
    assert max(requests[5:]) <= 8  # they do not grow with the number of shards
    proxy.requests.clear()
    assert w.complete() is not None
    assert count(proxy, "array_record.json") <= 20
  # Another process starts: one listing and its share of the notes, whatever the number of shards.
  proxy.requests.clear()
  with storage.Synced(url) as folder, store.Writer(folder, manifest(60), 1, 4) as w:
    assert w.missing() == [] and len(w.finished()) == 5
    assert on_disk(folder) < 1000
  assert count(proxy, "array_record.json") == 5
  assert len(proxy.requests) <= 5 + 8
  assert len(store.open_store(url)) == 60


def test_a_store_at_a_url_has_the_bytes_of_a_local_one(whole, url):
  assert record_at(url, None, 2) == [range(3), range(3, 6)]
  assert record_at(url) == [range(6, 9), range(9, 10)]
  assert object_stores.contents(url) == contents(whole)
  files.remove(files.join(url, shard_name(1)))
  files.write(files.join(url, shard_name(3)), b"cut")
  assert record_at(url) == [range(3, 6), range(9, 10)]
  assert object_stores.contents(url) == contents(whole)
  files.remove_tree(url)  # nothing that was deleted comes back
  with storage.Synced(url) as folder:
    assert [path.name for path in folder.iterdir()] == [".remote"]
  assert files.listing(url) == {}


def test_a_busy_store_and_lost_connections_do_not_change_the_store(whole, s3_url, s3):
  faults = {1: "reset_request", 2: 503, 3: "reset_response", 5: 503, 6: "reset", 9: 429}
  uploads = []

  def fault(method, path):
    if method in ("PUT", "POST"):
      uploads.append(path)
      return faults.get(len(uploads))
    return None

  s3.proxy.fault = fault
  record_at(s3_url)
  s3.proxy.fault = lambda method, path: None
  assert object_stores.contents(s3_url) == contents(whole)
  assert len(uploads) > 9
  assert len(store.open_store(s3_url)) == 10


@pytest.mark.slow
def test_a_store_that_stays_down_ends_the_run_and_keeps_finished_shards(
  whole, s3_url, s3, monkeypatch
):
  monkeypatch.setattr(retries, "RETRY_SECONDS", 1.0)
  assert record_at(s3_url, None, 2) == [range(3), range(3, 6)]
  s3.proxy.fault = lambda method, path: 503 if method in ("PUT", "POST") else None
  with pytest.raises(Unavailable, match=f"{shard_name(2)} cannot be written"):
    record_at(s3_url)
  s3.proxy.fault = lambda method, path: None
  assert record_at(s3_url) == [range(6, 9), range(9, 10)]
  assert object_stores.contents(s3_url) == contents(whole)


def test_a_bucket_that_refuses_writes_is_found_at_once(s3_url, s3):
  s3.proxy.fault = lambda method, path: None if method in ("GET", "HEAD") else 403
  with pytest.raises(InputError, match="the store refuses access"), claimed(s3_url):
    raise AssertionError


CHILD = """
  import sys
  sys.path[:0] = [{tests!r}, {root!r}]
  import tiny_store
  from distill_jax.runtime import storage
  with storage.Synced({url!r}) as folder:
    print("started", flush=True)
    tiny_store.record(folder, tiny_store.manifest({total}))
"""


def child(url, environment, total=10, prefix=()):
  code = CHILD.format(url=url, tests=str(TESTS), root=str(TESTS.parent), total=total)
  line = [*prefix, sys.executable, "-c", textwrap.dedent(code)]
  environment = os.environ | environment | {"JAX_PLATFORMS": "cpu"}
  return subprocess.Popen(
    line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )


UPLOADED = (".array_record", ".index", ".array_record.json", NAME)


@pytest.mark.parametrize("name", slow.all_but((".array_record", NAME), UPLOADED))
def test_a_process_killed_while_it_uploads_is_resumed(whole, s3_url, s3, name):
  """kill -9 arrives with the second upload of a shard, of an index, of a note, of a manifest."""
  seen = []

  def fault(method, path):
    if method == "PUT" and path.endswith(name):
      seen.append(path)
      if len(seen) == 2:
        os.kill(process.pid, signal.SIGKILL)
        return "reset_request"
    return None

  s3.proxy.fault = fault
  process = child(s3_url, s3.environment())
  _, err = process.communicate(timeout=120)
  assert process.returncode == -signal.SIGKILL, err
  s3.proxy.fault = lambda method, path: None
  todo = record_at(s3_url)
  assert len(todo) == (0 if name == NAME else 3)
  assert object_stores.contents(s3_url) == contents(whole)


@pytest.mark.parametrize(("size", "fits"), [("400k", True), ("100k", False)])
def test_a_private_disk_needs_room_for_two_shards(s3_url, s3, tmp_path, size, fits):
  """A tmpfs of 400 kB, with shards of 131 kB."""
  mount = f"mount -t tmpfs -o size={size} none {tmp_path} && export TMPDIR={tmp_path} && "
  prefix = ["unshare", "-m", "sh", "-c", f'{mount} exec "$0" "$@"']
  if subprocess.run([*prefix, "true"], capture_output=True).returncode:
    pytest.skip("no private mounts here")
  process = child(s3_url, s3.environment(), 60, prefix)
  _, err = process.communicate(timeout=120)
  if fits:
    assert process.returncode == 0, err
    assert len(store.open_store(s3_url)) == 60
  else:
    assert f"{shard_name(0)} cannot be written" in err.splitlines()[-1]
    assert shard_name(0) not in files.listing(s3_url)
