"""Digests of checkpoints: those of existing stores stay valid, and large files are hashed once."""

import hashlib
import json
import os

import pytest
from tiny_checkpoints import CONFIG, write_folder

from distill_jax.hub import identity, pretrained
from distill_jax.hub.pretrained import open_model

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


def test_a_result_that_was_not_written_completely_is_replaced(tmp_path, hashed):
  folder = write_folder(tmp_path / "m")
  digest = open_model(str(folder)).digest
  (kept,) = (tmp_path / "cache/digests").iterdir()
  kept.write_text("12ab")
  pretrained._open_folder.cache_clear()
  assert open_model(str(folder)).digest == digest and len(hashed) == 2
  assert len(kept.read_text()) == 64
