"""Identifies the content of a checkpoint, without reading it where a store knows its checksums.

The digest of a local folder is that of its bytes. They are hashed once per machine: the hash of a
large file is kept in DISTILL_JAX_CACHE, by its path, size and time of change. If hosts share that
folder, they divide the files: each begins with others, and waits for those being hashed.

The Hub lists the same hash of every file, so a repository and a copy of it on a disk have one
digest. Other stores keep other checksums (crc32c on GCS, an ETag on S3). The digest of a checkpoint
there is made of these, of the sizes and of the headers of its files.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax

from distill_jax.errors import InputError
from distill_jax.hub.weights import WeightFile
from distill_jax.runtime import files, mirror
from distill_jax.types import FamilyConfig

CACHED_FROM = 2**26  # bytes: smaller files are hashed in less than 0.1 seconds
SHA256 = re.compile(r"[0-9a-f]{64}")


def digest(config: FamilyConfig, weight_files: Sequence[WeightFile]) -> str:
  """Returns the SHA-256 digest, in hex, of a config and of weight files in order of their names.

  Raises:
    InputError: A store has no checksum of a file.
  """
  total = hashlib.sha256(json.dumps(config.to_hf(), sort_keys=True).encode())
  first = len(weight_files) * jax.process_index() // jax.process_count()
  order = [*weight_files[first:], *weight_files[:first]]
  with ThreadPoolExecutor(8) as pool:  # hashing releases the GIL
    parts = dict(zip(order, pool.map(_of_file, order), strict=True))
  for file in weight_files:
    total.update(parts[file])
  return total.hexdigest()


def check_unchanged(weight_files: Sequence[WeightFile]) -> None:
  """Checks that no file has changed since it was opened, with one listing of each folder.

  Raises:
    InputError: A file has been replaced or deleted.
  """
  folders = {path.rpartition("/")[0] for path, _, _ in weight_files}
  now = {folder: files.listing(folder or ".") for folder in folders}
  for path, info, _ in weight_files:
    folder, _, name = path.rpartition("/")
    if now[folder].get(name) != info:
      raise InputError(
        f"{path} has been replaced or deleted while the model was loaded. Run the command again."
      )


def _of_file(file: WeightFile) -> bytes:
  """Returns the bytes that stand for a file in the digest of its checkpoint."""
  path, (size, version), header = file
  if not files.is_remote(path):
    return _sha256(path, size, version)
  if path.startswith("hf://") and SHA256.fullmatch(version):
    return bytes.fromhex(version)
  if not version:
    raise InputError(
      f"The store has no checksum of {path}, so the model cannot be identified. Copy the model to "
      "a disk or to a bucket."
    )
  name = path.rpartition("/")[2]
  return hashlib.sha256(json.dumps([name, size, version, header]).encode()).digest()


def _sha256(path: str, size: int, version: str) -> bytes:
  """Returns the SHA-256 digest of a local file's bytes, from the cache if the file is the same."""
  if size < CACHED_FROM:
    return _hash(path)
  key = hashlib.sha256(json.dumps([os.path.realpath(path), size, version]).encode()).hexdigest()
  kept = mirror.cache_folder() / "digests" / key
  kept.parent.mkdir(parents=True, exist_ok=True)
  with kept.open("a+") as f:
    fcntl.flock(f, fcntl.LOCK_EX)  # other processes of this machine wait for the result
    f.seek(0)
    if not SHA256.fullmatch(text := f.read()):
      text = _hash(path).hex()
      f.truncate(0)
      f.write(text)
  return bytes.fromhex(text)


def _hash(path: str) -> bytes:
  with pathlib.Path(path).open("rb") as f:
    return hashlib.file_digest(f, "sha256").digest()
