"""Local files that are synced while they are written."""

import errno
import os

import pytest

from distill_jax.runtime import files, synced_file


@pytest.fixture(autouse=True)
def small_syncs(monkeypatch):
  monkeypatch.setattr(synced_file, "SYNC_BYTES", 1000)


def test_a_file_is_synced_while_it_is_written_and_at_its_end(tmp_path, monkeypatch):
  synced, data = [], os.urandom(50_000)
  for name in ("fdatasync", "fsync"):
    sync = getattr(os, name)

    def seen(fd, name=name, sync=sync):
      synced.append((name, os.fstat(fd).st_size))
      sync(fd)

    monkeypatch.setattr(os, name, seen)
  with files.open_write(tmp_path / "x") as f:
    for at in range(0, len(data), 10_000):
      f.write(data[at : at + 10_000])
    f.write(b"end")
  assert (tmp_path / "x").read_bytes() == data + b"end"
  assert synced[0][0] == "fdatasync" and synced[-1] == ("fsync", len(data) + 3)


def test_an_error_of_the_disk_while_a_file_is_written_is_raised(tmp_path, monkeypatch):
  """The system reports the error to one sync only; the last one would succeed."""

  def fail(fd):
    raise OSError(errno.EIO, "Input/output error")

  monkeypatch.setattr(os, "fdatasync", fail)
  with (
    pytest.raises(OSError, match="Input/output"),
    files.open_write(tmp_path / "x") as f,
  ):
    f.write(bytes(20_000))
  assert list(tmp_path.iterdir()) == []
