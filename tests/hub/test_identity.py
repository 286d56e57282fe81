"""Digests of checkpoints: those of existing stores stay valid, and large files are hashed once."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest
from tiny_checkpoints import CONFIG, write_folder

from distill_jax.hub import identity, pretrained
from distill_jax.hub.pretrained import open_model
from distill_jax.hub.weights import WeightFile
from distill_jax.runtime import files

pytestmark = pytest.mark.smoke


@pytest.fixture
def hashed(tmp_path, monkeypatch):
  """The files that are hashed, where every file counts as large."""
  seen, real = [], identity._hash
  monkeypatch.setenv("DISTILL_JAX_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(identity, "CACHED_FROM", 0)
  monkeypatch.setattr(identity, "_hash", lambda path: seen.append(path) or real(path))
  return seen


def test_the_digest_of_a_folder_is_that_of_its_config_and_bytes(tmp_path):
  folder = write_folder(tmp_path / "m")
  total = hashlib.sha256(json.dumps(CONFIG.to_hf(), sort_keys=True).encode())
  total.update(hashlib.sha256((folder / "model.safetensors").read_bytes()).digest())
  assert open_model(str(folder)).digest == total.hexdigest()


def test_a_large_file_is_hashed_once_on_a_machine(tmp_path, hashed):
  folder = write_folder(tmp_path / "m")
  digest = open_model(str(folder)).digest
  assert len(hashed) == 1
  pretrained._open_folder.cache_clear()  # as in another process
  assert open_model(str(folder)).digest == digest and len(hashed) == 1
  file = folder / "model.safetensors"
  data = bytearray(file.read_bytes())
  data[-1] ^= 1
  file.write_bytes(data)
  os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
  assert open_model(str(folder)).digest != digest and len(hashed) == 2


def test_hosts_that_share_the_cache_divide_the_files(tmp_path, hashed, monkeypatch):
  paths = [tmp_path / f"{i}.safetensors" for i in range(6)]
  for path in paths:
    path.write_text(path.name)
  weights = [WeightFile(str(path), files.info(path), "") for path in paths]
  monkeypatch.setattr(identity, "ThreadPoolExecutor", lambda _: ThreadPoolExecutor(1))
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  digests = set()
  for process in range(3):
    monkeypatch.setattr(jax, "process_index", lambda i=process: i)
    with monkeypatch.context() as patch:
      patch.setenv("DISTILL_JAX_CACHE", str(tmp_path / f"cache{process}"))
      digests.add(identity.digest(CONFIG, weights))
    assert hashed[6 * process :][:2] == [str(path) for path in paths[2 * process :][:2]]
  assert len(digests) == 1


def test_a_result_that_was_not_written_completely_is_replaced(tmp_path, hashed):
  folder = write_folder(tmp_path / "m")
  digest = open_model(str(folder)).digest
  (kept,) = (tmp_path / "cache/digests").iterdir()
  kept.write_text("12ab")
  pretrained._open_folder.cache_clear()
  assert open_model(str(folder)).digest == digest and len(hashed) == 2
  assert len(kept.read_text()) == 64
