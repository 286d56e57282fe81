"""Slices of the trained parameters of a checkpoint, read without the rest of it.

Memory: the slices that the caller holds, CACHE_BYTES of decoded chunks (a slice may end within a
chunk, whose rest the next slice needs), and the chunks in flight. Nothing grows with the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distill_jax.runtime import checkpoint, checksums, distributed, extras, orbax_s3
from distill_jax.types import JsonObject

with extras.needed("train"):
  import orbax.checkpoint as ocp
  import tensorstore

CACHE_BYTES = 256 * 2**20
REQUESTS = 32  # at a time
Sums = dict[str, list[int]]  # checksums of parts of arrays, by `key`; see checksums.part_sums
AGAIN = "#"


class SavedArrays:
  """The trained parameters of one checkpoint.

  Args:
    saves: The checkpoints of a run.
    step: The step of one of them.

  Attributes:
    folder: The checkpoint.
    about: dtype with shape, and checksum, of each parameter by path, e.g. "layers.q".
  """

  def __init__(self, saves: ocp.CheckpointManager, step: int):
    self._saves, self._step = saves, step
    self.folder = saves.directory / str(step)
    arrays = checkpoint.read_metadata(saves, step)["arrays"]
    self.about: dict[str, JsonObject] = {
      path.removeprefix(checkpoint.PARAMS): about
      for path, about in arrays.items()
      if path.startswith(checkpoint.PARAMS)
    }
    self._opened: dict[str, Any] = {}
    limit = {"limit": REQUESTS}
    self._context = tensorstore.Context(
      {
        "cache_pool": {"total_bytes_limit": CACHE_BYTES},
        "file_io_concurrency": limit,
        "gcs_request_concurrency": limit,
        "s3_request_concurrency": limit,
      }
    )

  @property
  def digest(self) -> str:
    """SHA-256, in hex, of the checksums."""
    return hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()

  def check_same_model(self, expected: Mapping[str, Any]) -> None:
    """Raises InputError unless the checkpoint has these parameters (or shapes), by path."""
    checkpoint.check_same_model(self.folder, self.about, expected)

  def start_reading(self, path: str, index: tuple[slice, ...], sums: Sums) -> Callable:
    """Starts to read a slice of a parameter; returns the function that waits for it.

    Args:
      path: The path of the parameter.
      index: A slice for each axis, with step 1.
      sums: The checksum of the slice is added to that of the path.
    """
    future = self._open(path)[index].read()

    def finish() -> np.ndarray:
      with checkpoint.reading(self._saves, self._step):
        x = future.result()
      start = np.array([s.start for s in index], np.uint32)
      with jax.default_device(distributed.host_device()):
        add(sums, {path: [int(n) for n in np.asarray(checksums.part_sums(x, start))]})
      return x

    return finish

  def check(self, sums: Sums) -> None:
    """Raises InputError if the checksum of a parameter, the sum of those of its slices, differs."""
    for counted, found in sums.items():
      path = counted.partition(AGAIN)[0]
      if found != self.about[path]["sums"]:
        why = f"the checksum of {path} differs"
        raise checkpoint.damage_error(self._saves, self._step, why)

  def _open(self, path: str) -> Any:
    """Returns tensorstore's array of a parameter."""
    if path in self._opened:
      return self._opened[path]
    base = _kvstore(f"{self.folder / checkpoint.STATE}")
    spec = {
      "driver": "zarr",
      "kvstore": {"driver": "ocdbt", "base": base, "path": f"{checkpoint.PARAMS}{path}/"},
      "recheck_cached_data": False,
      "recheck_cached_metadata": False,
      "fill_missing_data_reads": False,  # orbax stores every chunk
    }
    with checkpoint.reading(self._saves, self._step):
      found = tensorstore.open(spec, read=True, open=True, context=self._context).result()
    self._opened[path] = found
    return found


@contextmanager
def open_arrays(workdir: str | Path, step: int | None = None) -> Iterator[SavedArrays]:
  """A context manager that opens a checkpoint of a run.

  Args:
    workdir: The folder of the run.
    step: The step of the checkpoint; None for the last one.

  Raises:
    InputError: The checkpoint does not exist, or is damaged.
  """
  with checkpoint.open_run(workdir) as saves:
    yield SavedArrays(saves, checkpoint.existing_step(saves, step))


def key(path: str, readers: int) -> str:
  """Returns the key in Sums of a parameter that is read again, after `readers` other readings."""
  return f"{path}{AGAIN}{readers}" if readers else path


def add(sums: Sums, more: Sums) -> None:
  """Adds checksums of parts to others, modulo 2^32."""
  for path, values in more.items():
    before = sums.get(path, [0, 0])
    sums[path] = [(a + b) % 2**32 for a, b in zip(before, values, strict=True)]


def _kvstore(folder: str) -> JsonObject:
  """Returns tensorstore's description of a folder or URL."""
  if not folder.startswith(orbax_s3.SCHEMES):
    return {"driver": "file", "path": f"{folder}/"}
  spec = orbax_s3.kvstore(folder)
  return {**spec, "path": spec["path"].rstrip("/") + "/"}
