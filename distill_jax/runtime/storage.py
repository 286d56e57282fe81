"""Workdirs at URLs: where their files are, and how files come and go; see mirror.py."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from distill_jax.runtime import files, mirror
from distill_jax.runtime.files import is_remote
from distill_jax.runtime.mirror import REMOTE, Synced

__all__ = [
  "CHECKPOINTS",
  "Synced",
  "checkpoints",
  "fetched",
  "hand_over",
  "is_remote",
  "location",
  "remote_of",
  "run_folder",
  "share",
]

CHECKPOINTS = "checkpoints"


def remote_of(folder: str | os.PathLike[str]) -> str:
  """Returns the URL of a mirror or of a folder in a mirror; "" for any other folder."""
  folder = Path(folder).absolute()
  for parent in (folder, *folder.parents):
    if (parent / REMOTE).is_file():
      url, rest = (parent / REMOTE).read_text(), folder.relative_to(parent).as_posix()
      return url if rest == "." else files.join(url, rest)
  return ""


def location(folder: str | os.PathLike[str]) -> str:
  """Returns where the large files of a folder are: the URL of a mirror, or the folder itself."""
  return str(folder) if is_remote(folder) else remote_of(folder) or str(folder)


def checkpoints(workdir: str | os.PathLike[str]) -> str:
  """Returns the path or URL of a run's checkpoints, for orbax."""
  url = remote_of(workdir).removeprefix("file://")
  return files.join(url or Path(workdir).absolute(), CHECKPOINTS)


def run_folder(path: str | os.PathLike[str]) -> Path:
  """Returns a local folder with the small files of a run.

  It is the path itself, the mirror of a URL that a command of this process is writing, or a copy.
  """
  if not is_remote(path):
    return Path(path)
  return mirror.open_at(str(path).rstrip("/")) or _copy(str(path).rstrip("/"))


def _copy(url: str) -> Path:
  copy = tempfile.TemporaryDirectory(prefix="distill_jax-")
  _COPIES.append(copy)
  mirror.fill(url, Path(copy.name))
  return Path(copy.name)


_COPIES: list[tempfile.TemporaryDirectory[str]] = []  # deleted when the process ends


def fetched(path: Path) -> Path:
  """Returns the path of a file, after copying it to the mirror if it is only at the URL."""
  if not path.exists() and (url := remote_of(path.parent)):
    source = files.join(url, path.name)
    if files.info(source) is not None:
      _download(source, path)
      if (synced := mirror.synced_of(path)) is not None:
        synced.set_published(path, mirror.version_of(path))
  return path


def hand_over(path: Path) -> str:
  """Uploads a finished file, which does not change any more, and removes it from the mirror.

  Args:
    path: The file. In other folders than mirrors it stays where it is.

  Returns:
    The path or URL of the file.
  """
  if not (url := remote_of(path.parent)):
    return str(path)
  target, synced = files.join(url, path.name), mirror.synced_of(path)
  if synced is None:
    files.upload(path, target)
    path.unlink()
  else:
    synced.hand_over(path, target)
  return target


def share(path: Path) -> None:
  """Publishes a file that process 0 has just written, and copies it to the other processes.

  All processes must call it. It does nothing in other folders than mirrors.
  """
  from distill_jax.runtime import distributed  # imports jax

  if not (url := remote_of(path.parent)):
    return
  source = files.join(url, path.name)

  def publish() -> None:
    files.upload(path, source)
    if (synced := mirror.synced_of(path)) is not None:
      synced.set_published(path, mirror.version_of(path))

  distributed.run_on_process_0(publish)
  if not distributed.is_process_0():
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(files.read(source))


def _download(url: str, path: Path) -> None:
  with files.open_read(url) as found, files.open_write(path) as copy:
    shutil.copyfileobj(found, copy)
