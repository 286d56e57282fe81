"""The folder or URL of an export, which all processes write together.

Shard i is written by process i modulo their number, straight to its place. A file appears when it
is complete, and is followed by a note with the checksums of what was read. When all processes have
finished, process 0 compares the checksums and writes the other files, config.json last, so that an
incomplete export is not a model that loads. A local folder has a hidden name until then.

An export that was interrupted continues after the shards with notes, if it is started again with
the same checkpoint and options; else it starts over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from distill_jax.errors import InputError, Unavailable
from distill_jax.hub.tensors import Shard, Source, parts
from distill_jax.hub.weights import parse_hf_json
from distill_jax.runtime import distributed, files, json_io
from distill_jax.runtime.atomic_io import fsync_dir
from distill_jax.runtime.saved_arrays import Sums, add
from distill_jax.types import JsonObject

MARKER = "exporting.json"  # in the folder until the export is complete
NOTE = ".done"  # after the name of a finished shard
ATTEMPTS = 3  # at a shard whose upload breaks off


@dataclasses.dataclass(frozen=True)
class Content:
  """The files of an export.

  Attributes:
    shards: the files of tensors.
    source: where the values of the tensors are.
    texts: the other files, by name, in the order in which they are written.
    digest: a digest of the values; "" if it is not known, so that the export cannot be resumed.
    check: checks the checksums of all that was read.
  """

  shards: Sequence[Shard]
  source: Source
  texts: Mapping[str, bytes]
  digest: str = ""
  check: Callable[[Sums], None] = lambda sums: None

  @property
  def key(self) -> str:
    """A digest of all that the shards hold; "" if it is not known."""
    headers = b"".join(shard.header for shard in self.shards)
    return hashlib.sha256(self.digest.encode() + headers).hexdigest() if self.digest else ""


def write(target: str | os.PathLike[str], content: Content) -> None:
  """Writes a new folder. Every process must call this.

  Raises:
    InputError: The target exists, the disk is full, a value is too large for its dtype, or the
      checkpoint is damaged.
    Unavailable: The store of the target or of the checkpoint does not answer. The finished shards
      are kept.
  """
  with _new_folder(str(target), content) as folder:
    # Processes with separate disks do not see the folder of process 0.
    all_see_it = not distributed.max_over_processes(files.info(files.join(folder, MARKER)) is None)
    writers = jax.process_count() if all_see_it else 1
    distributed.run_on_all_processes(
      f"export {target}", lambda: _write_shards(folder, content, writers)
    )
    distributed.run_on_process_0(lambda: _finish(folder, content))


def exists(target: str | os.PathLike[str]) -> bool:
  """Returns whether a folder exists, and is not an export that was interrupted."""
  if files.is_remote(target):
    there = files.listing(target)
    return bool(there) and MARKER not in there
  return Path(target).exists()


def check_new(target: str | os.PathLike[str]) -> None:
  """Raises InputError if the folder to export to exists, unless an export was interrupted there."""
  if exists(target):
    raise InputError(f"{target} exists, and export does not overwrite. Choose another export.dir.")


def result_of(file: Path, verb: str) -> JsonObject | None:
  """Returns the result of a command that ends with an export, if an earlier call has finished it.

  Args:
    file: The result, which is written before the export; `dir` in it is the exported folder.
    verb: The command.
  """
  if not file.exists():
    return None
  result = json_io.read_object(file, f"delete it and run {verb} again")
  # Processes with separate disks do not see the folder of process 0.
  is_whole = distributed.max_over_processes(int(exists(result["dir"])))
  return result if is_whole else None


@contextlib.contextmanager
def _new_folder(target: str, content: Content) -> Iterator[str]:
  """Yields the folder to write into: that of a URL, or a hidden one that is renamed at the end."""
  if files.is_remote(target) and not target.startswith("file://"):
    folder = target.rstrip("/")
    distributed.run_on_process_0(lambda: _start(folder, target, content))
    yield folder
    return
  path = Path(target.removeprefix("file://")).absolute()
  work = path.with_name(f".{path.name}.tmp")
  with contextlib.ExitStack() as lock:

    def claim() -> None:
      check_new(path)
      work.mkdir(parents=True, exist_ok=True)
      lock.enter_context(_locked(work, path))
      _check_room(path, work, sum(shard.nbytes for shard in content.shards))

    def rename() -> None:
      fsync_dir(work)
      work.rename(path)
      fsync_dir(path.parent)

    distributed.run_on_process_0(claim)  # what it refuses may belong to another export
    try:
      distributed.run_on_process_0(lambda: _start(str(work), str(path), content))
      yield str(work)
      distributed.run_on_process_0(rename)
    except Unavailable:
      raise
    except Exception:
      if distributed.is_process_0():
        shutil.rmtree(work, ignore_errors=True)
      raise


@contextlib.contextmanager
def _locked(work: Path, target: Path) -> Iterator[None]:
  """Raises InputError while another process exports to the folder."""
  descriptor = os.open(work, os.O_RDONLY)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise InputError(
        f"Another process is exporting to {target}. Wait for it, or choose another export.dir."
      ) from None
    yield
  finally:
    os.close(descriptor)


def _start(folder: str, target: str, content: Content) -> None:
  """Empties the folder unless it holds a part of the same export."""
  there = files.listing(folder)
  if MARKER in there:
    marker = parse_hf_json(files.read(files.join(folder, MARKER)), files.join(folder, MARKER))
    if content.key and marker.get("key") == content.key:
      return
  elif there and files.is_remote(target):
    check_new(target)
  for name in there:
    files.remove(files.join(folder, name))
  files.write(files.join(folder, MARKER), json.dumps({"key": content.key}).encode())


def _check_room(target: Path, work: Path, need: int) -> None:
  need -= sum(info.size for info in files.listing(work).values())
  if (free := shutil.disk_usage(work).free) < need:
    raise InputError(
      f"{target} needs {need:,} bytes, but the disk has only {free:,} bytes free. Free some space."
    )


def _write_shards(folder: str, content: Content, writers: int) -> None:
  """Writes the shards of this process that are not finished."""
  done = files.listing(folder, f"*{NOTE}")
  together, failed = content.source.together, None
  for i, shard in enumerate(content.shards):
    mine = i % writers == jax.process_index() and shard.name + NOTE not in done
    if mine and failed is None:
      try:
        _write_shard(folder, shard, content.source)
      except (InputError, Unavailable, OSError) as error:
        if not together:
          raise
        failed = error
    elif together:
      _read_all(parts(content.source, shard.tensors, {}))
  if failed is not None:
    raise failed


def _write_shard(folder: str, shard: Shard, source: Source) -> None:
  """Writes a shard, again from its start when the connection breaks, and then its note."""
  path = files.join(folder, shard.name)
  for attempt in range(1, ATTEMPTS + 1):
    sums: Sums = {}
    values = parts(source, shard.tensors, sums)
    try:
      _write_file(path, shard.header, values)
      break
    except Unavailable as error:
      if attempt == ATTEMPTS or source.together:  # the others would not read it again
        raise
      print(f"{error} {path} is written again from its start.", file=sys.stderr, flush=True)
    finally:
      if source.together:  # the other processes compute the rest together with this one
        _read_all(values)
  files.write(path + NOTE, json.dumps(sums).encode())


def _write_file(path: str, header: bytes, values: Iterator[np.ndarray]) -> None:
  with files.open_write(path) as f, ThreadPoolExecutor(1) as background:
    f.write(header)
    writing: Future | None = None  # one part is written while the next is computed
    for part in values:
      if writing is not None:
        writing.result()
      writing = background.submit(f.write, part.reshape(-1).view(np.uint8).data)
    if writing is not None:
      writing.result()


def _read_all(values: Iterator[np.ndarray]) -> None:
  for _ in values:
    pass


def _finish(folder: str, content: Content) -> None:
  """Checks the checksums of all shards, and writes the other files."""
  sums: Sums = {}
  notes = [files.join(folder, shard.name + NOTE) for shard in content.shards]
  for note in notes:
    add(sums, parse_hf_json(files.read(note), note))
  content.check(sums)
  for name, data in content.texts.items():
    files.write(files.join(folder, name), data)
  for note in [*notes, files.join(folder, MARKER)]:
    files.remove(note)
