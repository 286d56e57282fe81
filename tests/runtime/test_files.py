"""runtime/files.py: local files, and real S3 and GCS servers with faults that are caused."""

import os
import resource
import subprocess
import sys

import pytest

from distill_jax.errors import InputError, Unavailable
from distill_jax.runtime import files, retries
from distill_jax.runtime.files import join


@pytest.fixture(params=["local", "s3", "gcs"])
def folder(request, tmp_path):
  return str(tmp_path) if request.param == "local" else request.getfixturevalue(request.param).url


def test_a_file_is_written_listed_read_and_removed(folder):
  path = join(folder, "a.bin")
  assert files.info(path) is None and files.listing(folder) == {}
  files.write(path, b"0123456789")
  files.write(join(folder, "sub/b.bin"), b"x")
  assert files.info(path).size == 10
  assert files.listing(folder) == {"a.bin": files.info(path)}
  assert files.listing(folder, "*.txt") == {}
  assert files.read(path) == b"0123456789"
  assert files.read_ranges([(path, 2, 5), (path, 0, 0), (path, 9, 10)]) == [b"234", b"", b"9"]
  files.remove(path)
  files.remove(path)
  assert files.info(path) is None
  files.remove_tree(folder)
  files.remove_tree(folder)
  assert files.listing(join(folder, "sub")) == {}


def test_the_version_changes_with_the_content(folder):
  path = join(folder, "a")
  files.write(path, b"one")
  before = files.info(path)
  files.write(path, b"two")
  assert files.info(path).version != before.version


def test_streams_hold_more_than_one_part(folder, tmp_path):
  data = os.urandom(2 * files.PART_BYTES + 12345)
  path = join(folder, "large")
  with files.open_write(path) as f:
    for at in range(0, len(data), 2**20):
      f.write(data[at : at + 2**20])
    assert files.info(path) is None
  with files.open_read(path) as f:
    assert f.read() == data
  (tmp_path / "source").write_bytes(data)
  files.upload(tmp_path / "source", join(folder, "uploaded"))
  assert files.read(join(folder, "uploaded")) == data


@pytest.mark.parametrize("nbytes", [100, 20 * 2**20])
def test_a_stream_that_ends_with_an_exception_leaves_no_file(folder, nbytes):
  with pytest.raises(KeyError), files.open_write(join(folder, "x")) as f:
    f.write(bytes(nbytes))
    raise KeyError
  assert files.listing(folder) == {}


def test_lines_are_streamed(folder):
  files.write(join(folder, "x.jsonl"), b"a\nbb\n\nccc")
  with files.open_read(join(folder, "x.jsonl")) as f:
    assert list(f) == [b"a\n", b"bb\n", b"\n", b"ccc"]


def test_faults_are_sentences(folder):
  path = join(folder, "x")
  for read in (files.read, files.open_read, lambda p: files.read_ranges([(p, 0, 1)])):
    with pytest.raises(InputError, match=r"x does not exist\. Correct the path\."):
      read(path)
  files.write(path, b"0123")
  with pytest.raises(InputError, match="x ends before byte 9: a read from byte 2 returned 2 bytes"):
    files.read_ranges([(path, 2, 9)])


def test_a_busy_store_is_asked_again(object_store):
  answers = [503, "reset", "reset_response", None]
  path = join(object_store.url, "x")
  files.write(path, b"0123")

  def fault(method, url):
    return answers.pop(0) if method == "GET" and answers else None

  object_store.proxy.fault = fault
  assert files.read_ranges([(path, 0, 4)]) == [b"0123"]
  assert not answers


def test_an_upload_that_is_reset_in_the_middle_is_repeated(object_store):
  faults = ["reset_request", 503]
  object_store.proxy.fault = lambda method, url: (
    faults.pop(0) if method in ("PUT", "POST") and faults else None
  )
  files.write(join(object_store.url, "x"), b"0123" * 1000)
  assert not faults
  assert files.read(join(object_store.url, "x")) == b"0123" * 1000


def test_every_retry_is_reported(capsys):
  failures = [ConnectionResetError("reset"), TimeoutError(), None]

  def fail():
    if (error := failures.pop(0)) is not None:
      raise error
    return 7

  assert retries.retry("gs://b/x cannot be read", fail) == 7
  first, second = capsys.readouterr().err.splitlines()
  assert first == "gs://b/x cannot be read (reset). The next try is in 0.5 s."
  assert second == "gs://b/x cannot be read (TimeoutError). The next try is in 1.0 s."


@pytest.mark.slow  # the same for writes, in the middle of a run: records/test_store_uploads.py
def test_a_store_that_stays_away_is_unavailable(s3, monkeypatch):
  """gcsfs retries for half a minute by itself, so the same on GCS takes longer."""
  monkeypatch.setattr(retries, "RETRY_SECONDS", 1.0)
  files.write(join(s3.url, "x"), b"0123")
  s3.proxy.fault = lambda *_: 503
  with pytest.raises(Unavailable, match="x cannot be read .*1 seconds of retries have not helped"):
    files.read(join(s3.url, "x"))


def test_refused_access_is_not_tried_again(object_store):
  object_store.proxy.fault = lambda *_: 403
  for use in (files.read, files.info, files.listing, lambda p: files.write(p, b"x")):
    with pytest.raises(InputError, match="the store refuses access"):
      use(join(object_store.url, "x"))


def test_a_file_that_is_replaced_while_it_is_streamed_is_refused(object_store, monkeypatch):
  path = join(object_store.url, "x")
  monkeypatch.setattr(files, "STREAM_BYTES", 4)
  files.write(path, b"01234567")
  with files.open_read(path) as f:
    assert f.read(4) == b"0123"
    files.write(path, b"abcdefgh")
    with pytest.raises(InputError, match="has been replaced while it was read"):
      f.read(4)


def test_ranges_are_read_at_once(object_store):
  path = join(object_store.url, "x")
  files.write(path, bytes(64))
  before = len(object_store.proxy.requests)
  files.read_ranges([(path, i, i + 1) for i in range(64)])
  assert len(object_store.proxy.requests) - before == 64


def test_too_many_open_files_are_called_that(tmp_path):
  (tmp_path / "x").write_bytes(b"0123")
  script = f"""
import resource
from distill_jax.runtime import files
files.read_ranges([({str(tmp_path / "x")!r}, 0, 4)] * 1000)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
try:
  files.read_ranges([({str(tmp_path / "x")!r}, 0, 4)])
except ValueError as e:
  print(e)
"""
  assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 3
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
  assert "too many files are open. Raise the limit with `ulimit -n`" in done.stdout
