"""Training from records in an object store, without copies of them on this machine."""

import os
import shutil
import subprocess
import sys

import pytest
import tiny
from object_stores import upload
from tiny_run import train

from distill_jax import config
from distill_jax.commands import inspect
from distill_jax.errors import InputError
from distill_jax.records import shard_index
from distill_jax.records.store import open_store
from distill_jax.runtime import files


def test_a_run_is_the_same_as_from_a_folder(tiny_run, tmp_path, s3, monkeypatch):
  monkeypatch.setenv("DISTILL_JAX_CACHE", str(tmp_path / "cache"))
  c = tiny.tiny(tiny_run)
  url = upload(tiny_run / "records", s3.url)
  c.train.records = (url,)
  s3.proxy.requests.clear()
  train(c, tmp_path / "run")
  assert tiny.measured(tmp_path / "run") == tiny.measured(tiny_run / "whole")
  assert not (tmp_path / "cache").exists()
  whole = [r for r in s3.proxy.requests if r.path.endswith(".array_record") and r.status == 200]
  assert not whole  # ranges have the status 206


def test_inspect_writes_the_indices_that_earlier_versions_did_not_write(tiny_run, tmp_path):
  folder = tmp_path / "records"
  shutil.copytree(tiny_run / "records", folder)
  shards = open_store(folder).manifest.shards
  indices = [folder / shard_index.name_of(s.name) for s in shards]
  before = [path.read_bytes() for path in indices]
  for path in indices[1:]:
    path.unlink()
  c = config.resolve(tiny.tiny(tiny_run))
  assert inspect.run(c, folder)["indices_written"] == len(indices) - 1
  assert [path.read_bytes() for path in indices] == before
  assert inspect.run(c, folder)["indices_written"] == 0


def test_inspect_at_a_url_makes_an_old_store_readable(tiny_run, tmp_path, s3):
  url = upload(tiny_run / "records", s3.url)
  names = [s.name for s in open_store(url).manifest.shards]
  for name in names:
    files.remove(files.join(url, shard_index.name_of(name)))
  with pytest.raises(InputError, match=f"inspect --workdir={url}"):
    open_store(url)
  command = ["inspect", f"--workdir={url}"]
  done = subprocess.run(
    [sys.executable, "-m", "distill_jax.cli", *command],
    env=os.environ | s3.environment() | {"DISTILL_JAX_CACHE": str(tmp_path / "cache")},
    capture_output=True,
    text=True,
    check=True,
  )
  assert f"indices_written: {len(names)}\n" in done.stdout
  assert open_store(url)[0]["tokens_T"].any()
  assert not list((tmp_path / "cache").rglob("*.array_record"))
