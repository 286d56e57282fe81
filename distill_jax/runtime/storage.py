"""Remote folders: gs://, s3:// and every other file system that fsspec supports.

A remote folder has a local mirror, and all other code uses the mirror: files are fetched before
they are read, and published after they are written. Checkpoints are an exception, because they may
not fit on one machine: orbax reads and writes them at the URL. Files are written under temporary
names that begin with a dot and then renamed. Other files are therefore complete and can be
published at any moment; names that begin with a dot are not published.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import fsspec

from distill_jax.errors import InputError
from distill_jax.runtime import extras

REMOTE = ".remote"  # file in a mirror that holds its URL
CHECKPOINTS = "checkpoints"
PUBLISH_EVERY = 30.0  # seconds between copies of a folder in use
# Smaller files (in bytes) are always copied, because they may be rewritten with the same size.
# Larger ones are copied if their size differs.
ALWAYS_COPIED_BELOW = 2**20
# By scheme, the package that fsspec opens it with, and the extra that installs it.
EXTRAS = {"gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
Version = tuple[int, int]  # size of a file, and time of its last change in nanoseconds


def is_remote(path: str | os.PathLike[str]) -> bool:
  """Returns True for a URL."""
  return "://" in str(path)


def mirror(path: str | os.PathLike[str]) -> Path:
  """Returns the local folder: the path itself, or the mirror of a URL."""
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
  """Returns the URL of a mirror; "" for any other folder."""
  file = Path(folder) / REMOTE
  return file.read_text() if file.is_file() else ""


def location(folder: str | os.PathLike[str]) -> str:
  """Returns where the large files of a folder are: the URL of a mirror, or the folder itself."""
  return str(folder) if is_remote(folder) else remote_of(folder) or str(folder)


def checkpoints(workdir: str | os.PathLike[str]) -> str:
  """Returns the path or URL of a run's checkpoints, for orbax."""
  url = remote_of(workdir).removeprefix("file://")
  return f"{url}/{CHECKPOINTS}" if url else str((Path(workdir) / CHECKPOINTS).absolute())


def fetch(path: str | os.PathLike[str]) -> Path:
  """Returns the local folder, after copying the files of a URL to it, except checkpoints.

  Raises:
    InputError: The URL cannot be read, or needs a package that is not installed.
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
  """Fetches a folder once per process, for folders that no longer change."""
  return fetch(path)


def file(path: str | os.PathLike[str]) -> Path:
  """Returns the local path of a file. The whole folder of a URL is fetched."""
  folder, _, name = str(path).rpartition("/")
  return local(folder) / name if is_remote(path) else Path(path)


def publish(folder: Path, published: dict[str, Version] | None = None) -> None:
  """Copies the files of a mirror to its URL, oldest first; does nothing for other folders.

  Args:
    folder: The folder.
    published: Versions of the files that earlier calls have copied, by name. It is updated.

  Raises:
    InputError: The URL cannot be read, or needs a package that is not installed.
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


class Synced:
  """Context manager for a working folder, with a mirror that is published regularly for a URL.

  On exit all files are published, also after an exception.
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
  """Returns the versions of the files of a folder just fetched, which need no publishing."""
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
    raise InputError(
      f"{url} cannot be opened: fsspec does not know the file system {scheme!r} ({e}). Correct the "
      "address."
    ) from e
  return fs, root.rstrip("/")


def _listing(fs: Any, root: str) -> dict[str, int]:
  """Returns the sizes of the files under a folder, by relative name, except checkpoints."""
  try:
    fs.invalidate_cache()
    files = fs.find(root, detail=True)
  except FileNotFoundError:
    return {}
  except OSError as e:
    raise InputError(
      f"{root} cannot be listed ({e}). Check the address and your permissions."
    ) from e
  sizes = {path.removeprefix(root).lstrip("/"): info["size"] for path, info in files.items()}
  return {name: size for name, size in sizes.items() if name and not _hidden(Path(name))}


def _hidden(name: Path) -> bool:
  """Returns True for files that are not mirrored: checkpoints and names with a leading dot."""
  return name.parts[0] == CHECKPOINTS or any(part.startswith(".") for part in name.parts)
