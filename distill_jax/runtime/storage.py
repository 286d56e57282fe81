"""Folders that lie elsewhere: gs://, s3://, and whatever else fsspec opens.

A remote folder has a mirror on this machine, and all other code sees the mirror: files are
fetched into it before they are read, and published from it once they are written. Only
checkpoints, which no machine of a pod could hold alone, go straight to their place (orbax
reads and writes there). Files are written under other names and renamed, so whatever has its
own name is whole and may be published at any moment; names that begin with a dot stay here.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from distill_jax.errors import InputError
from distill_jax.runtime import extras

REMOTE = ".remote"  # a file in a mirror: the URL of what it mirrors
CHECKPOINTS = "checkpoints"
PUBLISH_EVERY = 30.0  # seconds, for a folder in use
# Files below so many bytes may be rewritten with the same size, so they are always copied; larger
# ones are copied if their size differs.
ALWAYS_COPIED_BELOW = 2**20
# By scheme, the package that fsspec opens it with, and the extra that installs it.
EXTRAS = {"gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
Version = tuple[int, int]  # of a file: size, and time of its last change in nanoseconds


def is_remote(path: str | os.PathLike[str]) -> bool:
  return "://" in str(path)


def mirror(path: str | os.PathLike[str]) -> Path:
  """Returns the folder on this machine: the path itself, or the mirror of a URL."""
  if not is_remote(path):
    return Path(path)
  url = str(path).rstrip("/")
  cache = os.environ.get("DISTILL_JAX_CACHE", "~/.cache/distill_jax")
  name = f"{url.rpartition('/')[2]}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
  folder = Path(cache).expanduser() / "mirrors" / name
  folder.mkdir(parents=True, exist_ok=True)
  (folder / REMOTE).write_text(url)
  return folder


def remote_of(folder: str | os.PathLike[str]) -> str:
  """Returns the URL that a folder mirrors; "" for any other folder."""
  file = Path(folder) / REMOTE
  return file.read_text() if file.is_file() else ""


def checkpoints(workdir: str | os.PathLike[str]) -> str:
  """Returns where a run's checkpoints are: a path or URL, as orbax takes it."""
  url = remote_of(workdir).removeprefix("file://")
  return f"{url}/{CHECKPOINTS}" if url else str((Path(workdir) / CHECKPOINTS).absolute())


def fetch(path: str | os.PathLike[str]) -> Path:
  """Returns the folder on this machine, with all that its URL holds except checkpoints.

  Raises:
    InputError: the URL cannot be reached, or needs a package that is not installed.
  """
  folder = mirror(path)
  if not is_remote(path):
    return folder
  fs, root = _open(str(path))
  for name, size in _listing(fs, root).items():
    copy = folder / name
    if size >= ALWAYS_COPIED_BELOW and copy.is_file() and copy.stat().st_size == size:
      continue
    copy.parent.mkdir(parents=True, exist_ok=True)
    part = copy.with_name(f".{copy.name}.{os.getpid()}.part")
    fs.get_file(f"{root}/{name}", str(part))
    part.replace(copy)
  return folder


@functools.cache
def local(path: str | os.PathLike[str]) -> Path:
  """Fetches a folder once a process: for what is finished and does not change."""
  return fetch(path)


def file(path: str | os.PathLike[str]) -> Path:
  """Returns a file on this machine; one of a URL is fetched with all of its folder."""
  folder, _, name = str(path).rpartition("/")
  return local(folder) / name if is_remote(path) else Path(path)


def publish(folder: Path, published: dict[str, Version] | None = None) -> None:
  """Copies a mirror's files to its URL, oldest first; does nothing for any other folder.

  Args:
    published: the files that earlier calls have copied, by name; updated.
  """
  if not (url := remote_of(folder)):
    return
  published = {} if published is None else published
  fs, root = _open(url)
  remote_sizes = _listing(fs, root) if not published else {}
  files = [p for p in folder.rglob("*") if p.is_file() and not _hidden(p.relative_to(folder))]
  for path in sorted(files, key=lambda p: (p.stat().st_mtime_ns, p.name)):
    name, stat = path.relative_to(folder).as_posix(), path.stat()
    version = stat.st_size, stat.st_mtime_ns
    same_size = remote_sizes.get(name) == stat.st_size
    is_there = same_size and stat.st_size >= ALWAYS_COPIED_BELOW
    if published.get(name) != version and not is_there:
      fs.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
      fs.put_file(str(path), f"{root}/{name}")
    published[name] = version


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
  """Yields the folder to make: the path, or a folder that is copied to the URL at the end.

  Raises:
    InputError: there is something at the URL.
  """
  if not is_remote(path):
    yield Path(path)
    return
  fs, root = _open(str(path))
  if _listing(fs, root):
    raise InputError(f"{path} exists, and export overwrites nothing; name a folder that does not")
  with tempfile.TemporaryDirectory() as tmp:
    folder = Path(tmp) / "made"
    yield folder
    # The largest first: config.json comes once the weights are there.
    for source in sorted(folder.glob("*"), key=lambda p: -p.stat().st_size):
      fs.makedirs(root, exist_ok=True)
      fs.put_file(str(source), f"{root}/{source.name}")


class Synced:
  """A folder to work in: a path, or a mirror that is published while it is used.

  A context manager. On exit everything is published, also if an exception ends the work.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self._path = path

  def __enter__(self) -> Path:
    self._folder = fetch(self._path)
    self._published = _versions_after_fetch(self._path)
    self._stopped = threading.Event()
    self._thread = threading.Thread(target=self._publish_regularly, daemon=True)
    if is_remote(self._path):
      self._thread.start()
    return self._folder

  def _publish_regularly(self) -> None:
    while not self._stopped.wait(PUBLISH_EVERY):
      publish(self._folder, self._published)

  def __exit__(self, *_: object) -> None:
    self._stopped.set()
    if self._thread.is_alive():
      self._thread.join()
    publish(self._folder, self._published)


def _versions_after_fetch(path: str | os.PathLike[str]) -> dict[str, Version]:
  """Returns the files of a folder just fetched, which `publish` need not copy back."""
  if not is_remote(path):
    return {}
  stats = {name: (mirror(path) / name).stat() for name in _listing(*_open(str(path)))}
  return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def _open(url: str) -> tuple[Any, str]:
  scheme = url.partition("://")[0]
  try:
    fs, root = fsspec.core.url_to_fs(url.rstrip("/"))
  except ImportError as e:
    if scheme in EXTRAS:
      raise extras.missing(*EXTRAS[scheme]) from e
    raise InputError(f"{url} needs a package that is not installed ({e}). Install it.") from e
  except ValueError as e:
    raise InputError(f"{url}: {scheme!r} is no file system that fsspec knows ({e})") from e
  return fs, root.rstrip("/")


def _listing(fs: Any, root: str) -> dict[str, int]:
  """Returns the sizes of the files under a folder, by relative name, without checkpoints."""
  try:
    fs.invalidate_cache()
    files = fs.find(root, detail=True)
  except FileNotFoundError:
    return {}
  except OSError as e:
    raise InputError(f"{root} cannot be listed ({e}); check the address and your rights") from e
  sizes = {path.removeprefix(root).lstrip("/"): info["size"] for path, info in files.items()}
  return {name: size for name, size in sizes.items() if name and not _hidden(Path(name))}


def _hidden(name: Path) -> bool:
  """Returns whether a file is not mirrored: checkpoints, and names that begin with a dot."""
  return name.parts[0] == CHECKPOINTS or any(part.startswith(".") for part in name.parts)
