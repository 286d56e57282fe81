"""The mirror of a URL: a local folder with its small files, which is published regularly.

The folder of a run has a mirror for each process, a local folder that other code reads and writes.
A mirror holds small files only, whatever the size of the run: stores, checkpoints and the
compilation cache are read and written at the URL by those who own them (ELSEWHERE), and other large
files are copied when they are needed (`fetched`) or finished (`hand_over`). So a mirror takes a few
MB of disk. A start takes one request per small file, and lists all folders but those of ELSEWHERE:
one request per 1,000 files, also of stores, because their folders may hold small files too.

* What is at the URL counts. A mirror is emptied and filled again at the start of a command, so that
  nothing that was deleted at the URL comes back. After kill -9, the same is lost as with the
  machine: the changes to small files of the last PUBLISH_EVERY seconds.
* Process 0 publishes its mirror, regularly and on exit: new and changed files, and the deletion of
  files that were deleted in the mirror. Other processes publish nothing but what they `hand_over`.
* Times are compared only with times of the same host.
* Files are written under names that begin with a dot and then renamed. Other files are therefore
  complete, or logs of complete lines. Names that begin with a dot are not published.
"""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from distill_jax.errors import InputError, Preempted
from distill_jax.runtime import files, remote_files

REMOTE = ".remote"  # file in a mirror that holds its URL
# Names in a workdir that are not mirrored: checkpoints (orbax), stores (records/writer.py), the
# places in a corpus at which their shards begin (records/packed_text.py), the statistics of their
# shards (cross_tokenizer/summary.py), and texts with their scores (on_policy/round_folders.py).
ELSEWHERE = (
  ".*",
  "checkpoints",
  "records-*",
  "manifest.json",
  "features.json",
  "dataset_info.json",
  "packing*",
  "retarget*",
  "rounds",
  "verdicts",  # these three: filters/pipeline.py
  "kept",
  "rejected",
)
SMALL = 2**20  # size in bytes of the files that are copied at the start, exclusive
PUBLISH_EVERY = 30.0  # seconds between copies of a folder in use
PUBLISHED_BYTES = 2**20  # bytes per second at which a growing file is copied again, at most
SNAPSHOT = 2**26  # larger files, in bytes, are not read into memory to be published
Version = tuple[int, int]  # size of a local file, and time of its last change in nanoseconds


class Synced:
  """Context manager for a working folder, with a mirror that is published regularly for a URL.

  On exit all files are published, also after an exception. After `retries.RETRY_SECONDS` in which
  publishing fails, all processes stop at their next step.

  Args:
    path: The folder, a path or URL.
    part: The part of the work of this run, for runs of different parts in one folder.

  Raises:
    InputError: The URL cannot be read or written, or a command of this machine uses it.
    Unavailable: The URL cannot be read, or on exit: written, for `retries.RETRY_SECONDS`.
  """

  def __init__(self, path: str | os.PathLike[str], part: str = ""):
    self._part = part
    self._path, self.url = path, str(path).rstrip("/")
    self._published: dict[str, Version | None] = {}  # None: handed over, and not in the mirror
    self._due: dict[str, float] = {}  # when a file may be copied again
    self._changing = threading.Lock()  # held while a file is uploaded or deleted
    self.is_abandoned = False
    self._stopped = threading.Event()
    self._thread = threading.Thread(target=self._publish_regularly, daemon=True)

  def __enter__(self) -> Path:
    if not files.is_remote(self._path):
      return Path(self._path)
    import jax

    self.folder = folder_of(self.url, f"{jax.process_index()}{self._part}")
    self._lock = _lock(self.folder, self.url)
    try:
      shutil.rmtree(self.folder, ignore_errors=True)
      self.folder.mkdir(parents=True)
      self._published |= fill(self.url, self.folder)
    except BaseException:
      self._lock.close()
      raise
    _OPEN[self.folder] = self
    self._publishes = jax.process_index() == 0
    if self._publishes:
      self._thread.start()
    return self.folder

  def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
    if not files.is_remote(self._path):
      return
    try:
      if self._publishes:
        self._stopped.set()
        self._thread.join()
        self._publish_at_the_end(kind)
    finally:
      del _OPEN[self.folder]
      self._lock.close()

  def _publish_at_the_end(self, kind: type[BaseException] | None) -> None:
    try:
      self.publish(everything=True)
    except Exception as e:
      if kind is None or issubclass(kind, Preempted):
        raise
      print(f"The last files are not published: {e}", file=sys.stderr)  # the first error counts

  def _publish_regularly(self) -> None:
    from distill_jax.runtime import distributed

    while not self._stopped.wait(PUBLISH_EVERY):
      try:
        self.publish()
      except Exception as e:
        print(f"{self.url} is not up to date: {e}", file=sys.stderr)
        distributed.Preemption.request()

  def publish(self, everything: bool = False) -> None:
    """Copies new and changed files to the URL, oldest first, and repeats deletions.

    Args:
      everything: True to copy large growing files before they are due.

    Raises:
      InputError: The mirror was deleted.
      Unavailable: The URL cannot be written.
    """
    for path, version in sorted(_files(self.folder), key=lambda found: (found[1][1], found[0])):
      name = self._name(path)
      waits = time.monotonic() < self._due.get(name, 0.0) and not everything
      with self._changing:
        if self.is_abandoned:
          return
        if self._published.get(name) == version or waits:
          continue
        try:
          _upload(path, files.join(self.url, name))
        except FileNotFoundError:
          if path.exists():
            raise
          continue  # deleted since the folder was listed
        self._published[name] = version
      self._due[name] = time.monotonic() + version[0] / PUBLISHED_BYTES
    self._check_folder()
    for name, published in list(self._published.items()):
      with self._changing:
        if published is not None and not (self.folder / name).exists():
          files.remove(files.join(self.url, name))
          del self._published[name]

  def _check_folder(self) -> None:
    """Raises InputError if the mirror was deleted, e.g. with the cache: that deletes nothing."""
    if not (self.folder / REMOTE).exists():
      raise InputError(
        f"{self.folder}, the local part of {self.url}, was deleted during the run. Files at the "
        "URL are kept. Run the same command again to continue."
      )

  def hand_over(self, path: Path, url: str) -> None:
    """Uploads a file, and removes it from the mirror without deleting it at the URL."""
    with self._changing:
      files.upload(path, url)
      self._published[self._name(path)] = None
      path.unlink()

  def set_published(self, path: Path, version: Version) -> None:
    """Notes that this version of a file is at the URL."""
    with self._changing:
      self._published[self._name(path)] = version

  def _name(self, path: Path) -> str:
    return path.absolute().relative_to(self.folder).as_posix()


_OPEN: dict[Path, Synced] = {}  # the mirrors in use


def synced_of(path: Path) -> Synced | None:
  """Returns the mirror in use that a file is in, or None."""
  return next((_OPEN[parent] for parent in path.absolute().parents if parent in _OPEN), None)


def open_at(url: str) -> Path | None:
  """Returns the folder of a URL in a mirror in use, or None."""
  for synced in _OPEN.values():
    if url == synced.url or url.startswith(synced.url + "/"):
      return synced.folder / url.removeprefix(synced.url).lstrip("/")
  return None


def abandon(url: str) -> None:
  """Ends the publishing of all mirrors in use at a URL and below, which another run has taken."""
  for synced in _OPEN.values():
    if f"{synced.url}/".startswith(f"{url}/"):
      synced.is_abandoned = True


def cache_folder() -> Path:
  """Returns the folder of this user's cache, which hosts may share."""
  return Path(os.environ.get("DISTILL_JAX_CACHE", "~/.cache/distill_jax")).expanduser().absolute()


def folder_of(url: str, process: str) -> Path:
  """Returns the folder of a process of this host; the cache may be shared by hosts."""
  name = f"{url.rpartition('/')[2]}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
  return cache_folder() / "mirrors" / name / f"{socket.gethostname()}.{process}"


def _lock(folder: Path, url: str) -> IO[str]:
  """Returns a locked file next to a mirror. Closing it or the end of the process releases it."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  f = folder.with_name(f"{folder.name}.lock").open("a+")
  try:
    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    f.close()
    raise InputError(
      f"{url} is in use by another process of this machine. Wait for it, or choose another folder."
    ) from None
  return f


def fill(url: str, folder: Path) -> dict[str, Version]:
  """Copies the small files of a URL to a folder; returns the versions of the copies, by name."""
  (folder / REMOTE).write_text(url)
  found = files.tree(url, is_elsewhere)
  small = [name for name, info in found.items() if info.size < SMALL]

  def copy(name: str) -> None:
    path = folder / name
    try:
      data = files.read(files.join(url, name))
    except InputError:
      if files.info(files.join(url, name)) is None:  # deleted since the folder was listed
        return
      raise
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)

  with ThreadPoolExecutor(remote_files.IN_FLIGHT) as pool:
    list(pool.map(copy, small))
  return {path.relative_to(folder).as_posix(): version for path, version in _files(folder)}


def _files(folder: Path) -> Iterator[tuple[Path, Version]]:
  """Yields the files of a mirror that are published, with their versions."""
  for root, folders, names in os.walk(folder):
    folders[:] = [name for name in folders if not is_elsewhere(name)]
    for name in names:
      path = Path(root) / name
      if not is_elsewhere(name) and path.is_file():
        try:
          yield path, version_of(path)
        except FileNotFoundError:  # deleted since the folder was listed
          continue


def is_elsewhere(name: str) -> bool:
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in ELSEWHERE)


def version_of(path: Path) -> Version:
  stat = path.stat()
  return stat.st_size, stat.st_mtime_ns


def _upload(path: Path, url: str) -> None:
  """Copies the present content of a file, to which rows may be appended meanwhile."""
  if path.stat().st_size > SNAPSHOT:
    files.upload(path, url)
  else:
    files.write(url, path.read_bytes())
