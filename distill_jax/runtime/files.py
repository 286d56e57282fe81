"""Files by path or URL: range reads, streams, small reads and writes, and uploads.

A path is local, or a URL of a file system that fsspec knows, such as gs://, s3:// or hf://. Errors
that may pass, such as a busy server or a lost connection, are retried with growing delays, and each
retry is reported on standard error. No function keeps a file open after it returns, except the two
streams, so the number of open files does not grow with the number of files that are read.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import io
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from distill_jax.errors import InputError, Unavailable
from distill_jax.runtime import remote_files, retries
from distill_jax.runtime.remote_files import FileInfo, Range
from distill_jax.runtime.retries import retry
from distill_jax.runtime.synced_file import SyncedFile

STREAM_BYTES = 8 * 2**20  # size of one request of `open_read`
PART_BYTES = 16 * 2**20  # size of one part of an upload; S3 allows 10,000 parts


def is_remote(path: str | os.PathLike[str]) -> bool:
  """Returns True for a URL."""
  return "://" in str(path)


def join(folder: str | os.PathLike[str], name: str) -> str:
  """Returns the path or URL of a file in a folder."""
  return f"{str(folder).rstrip('/')}/{name}"


def info(path: str | os.PathLike[str]) -> FileInfo | None:
  """Returns the size and version of a file; None if it does not exist or is a folder."""
  if (local := _local(path)) is not None:
    return _stat(local.stat()) if local.is_file() else None
  fs, name = remote_files.resolve(str(path))
  try:
    found = retry(f"{path} cannot be found", lambda: fs.info(name))
  except FileNotFoundError:
    return None
  return remote_files.info_of(found) if found["type"] == "file" else None


def listing(folder: str | os.PathLike[str], pattern: str = "*") -> dict[str, FileInfo]:
  """Returns the files directly in a folder, by name, sorted; {} if it does not exist.

  Args:
    folder: The folder. A store lists 1,000 files per request.
    pattern: The names to return, as a shell pattern, e.g. "*.jsonl".
  """
  found = _children(folder)[0]
  return {name: found[name] for name in sorted(found) if fnmatch.fnmatchcase(name, pattern)}


def folders(folder: str | os.PathLike[str]) -> list[str]:
  """Returns the names of the folders directly in a folder, sorted; [] if it does not exist."""
  return sorted(_children(folder)[1])


def tree(folder: str | os.PathLike[str], is_skipped: Callable[[str], bool]) -> dict[str, FileInfo]:
  """Returns the files in a folder and in its subfolders, by relative path; {} for an empty folder.

  Args:
    folder: The folder.
    is_skipped: Returns True for the name of a file or subfolder to skip, which is not listed.
  """
  found, subfolders = _children(folder)
  result = {name: found[name] for name in sorted(found) if not is_skipped(name)}
  for name in sorted(subfolders):
    if not is_skipped(name):
      below = tree(join(folder, name), is_skipped)
      result |= {f"{name}/{path}": info for path, info in below.items()}
  return result


def _children(folder: str | os.PathLike[str]) -> tuple[dict[str, FileInfo], list[str]]:
  """Returns the files of a folder, by name, and the names of its subfolders."""
  if (local := _local(folder)) is not None:
    if not local.is_dir():
      return {}, []
    with os.scandir(local) as entries:
      children = list(entries)
    stats = {e.name: _entry_stat(e) for e in children if e.is_file()}
    found = {name: stat for name, stat in stats.items() if stat is not None}
    return found, [e.name for e in children if e.is_dir()]
  try:
    return retry(f"{folder} cannot be listed", lambda: remote_files.children(str(folder)))
  except (FileNotFoundError, NotADirectoryError):
    return {}, []


def read(path: str | os.PathLike[str]) -> bytes:
  """Returns the content of a small file.

  Raises:
    InputError: The file does not exist or cannot be read.
  """
  if (local := _local(path)) is not None:
    with _local_errors(path):
      return local.read_bytes()
  fs, name = remote_files.resolve(str(path))
  try:
    return retry(f"{path} cannot be read", lambda: fs.cat_file(name))
  except FileNotFoundError as e:
    raise _missing(path) from e


def read_ranges(ranges: Sequence[Range]) -> list[bytes]:
  """Returns ranges of bytes, of one file or of several, in order.

  Ranges of URLs are read concurrently, IN_FLIGHT at a time. Every range is one request.

  Args:
    ranges: The path, the first byte and the byte after the last one of each range.

  Raises:
    InputError: A file does not exist, cannot be read, or ends before the range does.
  """
  results: list[bytes] = [b""] * len(ranges)
  remote: dict[str, list[int]] = {}
  for i, (path, start, stop) in enumerate(ranges):
    if (local := _local(path)) is not None:
      results[i] = _read_local(local, start, stop)
    elif stop > start:
      remote.setdefault(str(path).partition("://")[0], []).append(i)
  for places in remote.values():
    todo, path = list(places), str(ranges[places[0]][0])

    def fetch(todo: list[int] = todo) -> None:
      for i, data in zip(
        list(todo), remote_files.cat_ranges([ranges[i] for i in todo]), strict=True
      ):
        if not isinstance(data, BaseException):
          results[i] = data
          todo.remove(i)
        else:
          error = data
      if todo:
        raise error

    try:
      retry(f"{path} cannot be read", fetch)
    except FileNotFoundError as e:
      raise _missing(ranges[todo[0]][0]) from e
  for (path, start, stop), data in zip(ranges, results, strict=True):
    if len(data) != stop - start:
      raise InputError(
        f"{path} ends before byte {stop}: a read from byte {start} returned {len(data)} bytes. The "
        "file is truncated or has been replaced; write or download it again."
      )
  return results


def open_read(path: str | os.PathLike[str]) -> BinaryIO:
  """Returns a buffered stream of a large file, which holds STREAM_BYTES in memory.

  Raises:
    InputError: The file does not exist. While it is read: it cannot be read, or has been replaced.
  """
  if (local := _local(path)) is not None:
    with _local_errors(path):
      return local.open("rb")
  found = info(path)
  if found is None:
    raise _missing(path)
  return io.BufferedReader(_RemoteReader(str(path), found), STREAM_BYTES)


@contextlib.contextmanager
def open_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
  """A context manager that yields a stream to write a file of any size.

  The file appears when the block ends; after an exception it does not. A URL is uploaded in parts
  of PART_BYTES while it is written, so memory does not grow with it. A local file is on disk then.
  """
  if (local := _local(path)) is not None:
    local.parent.mkdir(parents=True, exist_ok=True)
    part = temporary(local)
    try:
      with SyncedFile(part) as raw, io.BufferedWriter(raw) as f:
        yield f
        f.flush()
        raw.sync()
      part.replace(local)
    finally:
      part.unlink(missing_ok=True)
    return
  fs, name = remote_files.resolve(str(path))
  stream = retry(f"{path} cannot be opened", lambda: fs.open(name, "wb", block_size=PART_BYTES))
  try:
    yield stream
    stream.close()
  except BaseException as e:
    with contextlib.suppress(Exception):
      stream.discard()
    stream.closed = True  # so that the garbage collector does not finish the upload
    if isinstance(e, Exception) and retries.may_pass(e):
      raise Unavailable(
        f"{path} cannot be written ({retries.reason(e)}). Run the command again."
      ) from e
    if isinstance(e, Exception) and retries.is_refused(e):
      raise retries.refused(f"{path} cannot be written", e) from e
    raise


def write(path: str | os.PathLike[str], data: bytes) -> None:
  """Writes a small file, which appears at once with its whole content."""
  if _local(path) is not None:
    with open_write(path) as f:
      f.write(data)
    return
  fs, name = remote_files.resolve(str(path))
  retry(f"{path} cannot be written", lambda: fs.pipe_file(name, data))


def upload(source: str | os.PathLike[str], url: str | os.PathLike[str]) -> None:
  """Copies a local file to a path or URL, where it appears at once with its whole content."""
  if _local(url) is not None:
    with open_write(url) as f, Path(source).open("rb") as data:
      shutil.copyfileobj(data, f, STREAM_BYTES)
    return
  fs, name = remote_files.resolve(str(url))
  retry(f"{url} cannot be written", lambda: fs.put_file(str(source), name))


def remove(path: str | os.PathLike[str]) -> None:
  """Deletes a file, if it exists."""
  if (local := _local(path)) is not None:
    local.unlink(missing_ok=True)
    return
  fs, name = remote_files.resolve(str(path))
  with contextlib.suppress(FileNotFoundError):
    retry(f"{path} cannot be deleted", lambda: fs.rm_file(name))


def remove_tree(folder: str | os.PathLike[str]) -> None:
  """Deletes a folder with everything in it, if it exists."""
  if (local := _local(folder)) is not None:
    shutil.rmtree(local, ignore_errors=True)
    return
  fs, name = remote_files.resolve(str(folder))
  with contextlib.suppress(FileNotFoundError):
    retry(f"{folder} cannot be deleted", lambda: fs.rm(name, recursive=True))


def temporary(path: Path) -> Path:
  """Returns a hidden name next to a local file that is unique over all processes and hosts."""
  return path.with_name(f".{path.name}.{socket.gethostname()}.{uuid.uuid4().hex[:12]}.part")


class _RemoteReader(io.RawIOBase):
  """An unbuffered reader of a URL, which reads by ranges."""

  def __init__(self, path: str, found: FileInfo):
    self._path, self._found, self._at = path, found, 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._found.size}[whence]
    self._at = base + offset
    return self._at

  def tell(self) -> int:
    return self._at

  def readall(self) -> bytes:
    return b"".join(iter(lambda: self.read(STREAM_BYTES) or b"", b""))

  def readinto(self, buffer: Any) -> int:
    stop = min(self._at + len(buffer), self._found.size)
    if stop <= self._at:
      return 0
    (data,) = read_ranges([(self._path, self._at, stop)])
    buffer[: len(data)] = data
    self._at = stop
    if stop == self._found.size and info(self._path) != self._found:
      raise InputError(f"{self._path} has been replaced while it was read. Run the command again.")
    return len(data)


def _local(path: str | os.PathLike[str]) -> Path | None:
  """Returns a local path, also for file:// URLs; None for other URLs."""
  text = str(path)
  if text.startswith("file://"):
    return Path(text.removeprefix("file://"))
  return None if "://" in text else Path(text)


def _read_local(path: Path, start: int, stop: int) -> bytes:
  with _local_errors(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
      data = os.pread(descriptor, stop - start, start)
      while len(data) < stop - start and (
        more := os.pread(descriptor, stop - start - len(data), start + len(data))
      ):
        data += more  # Linux returns at most 2 GiB
      return data
    finally:
      os.close(descriptor)


@contextlib.contextmanager
def _local_errors(path: str | os.PathLike[str]) -> Iterator[None]:
  """Turns errors of opening a local file into InputErrors."""
  try:
    yield
  except FileNotFoundError as e:
    raise _missing(path) from e
  except OSError as e:
    if e.errno in (errno.EMFILE, errno.ENFILE):
      raise InputError(
        f"{path} cannot be opened: too many files are open. Raise the limit with `ulimit -n`."
      ) from e
    if isinstance(e, (PermissionError, IsADirectoryError, NotADirectoryError)):
      raise InputError(
        f"{path} cannot be read ({e.strerror}). Correct the path or its mode."
      ) from e
    raise


def _missing(path: str | os.PathLike[str]) -> InputError:
  return InputError(f"{path} does not exist. Correct the path.")


def _stat(found: os.stat_result) -> FileInfo:
  return FileInfo(found.st_size, str(found.st_mtime_ns))


def _entry_stat(entry: os.DirEntry[str]) -> FileInfo | None:
  try:
    return _stat(entry.stat())
  except FileNotFoundError:  # removed since the folder was read
    return None
