"""File systems of URLs, through fsspec; `files.py` is the module to use."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from distill_jax.errors import InputError
from distill_jax.runtime import extras, hub_ranges, retries

IN_FLIGHT = 32  # requests at once
# By scheme, the package that fsspec opens it with, and the extra that installs it.
EXTRAS = {"gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
# Fields of fsspec's `info` that identify the content of a file, in order of preference.
CHECKSUMS = ("crc32c", "ETag", "etag", "blob_id", "created", "mtime")
Range = tuple[str | os.PathLike[str], int, int]  # path, first byte, and byte after the last


class FileInfo(NamedTuple):
  """The size of a file, and a text that changes with its content.

  Attributes:
    size: Size in bytes.
    version: The checksum that the store keeps: crc32c on GCS, the ETag on S3, the sha256 of LFS
      files on the Hub; for local files, the time of the last change in nanoseconds.
  """

  size: int
  version: str


@functools.cache
def _file_system(scheme: str) -> Any:
  import fsspec  # a local store can be read without it

  options: dict[str, Any] = {"use_listings_cache": False}
  if scheme == "s3":
    options["config_kwargs"] = {"max_pool_connections": IN_FLIGHT}
  try:
    return fsspec.filesystem(scheme, **options)
  except ImportError as e:
    if scheme in EXTRAS:
      raise extras.missing(*EXTRAS[scheme]) from e
    raise InputError(f"{scheme}:// needs a package that is not installed ({e}). Install it.") from e
  except ValueError as e:
    raise InputError(
      f"{scheme}:// cannot be opened: fsspec does not know this file system ({e}). Correct the "
      "address."
    ) from e


def forget() -> None:
  """Forgets the connections, so that the next call uses fsspec's present configuration."""
  import fsspec

  _file_system.cache_clear()
  for name in fsspec.registry:
    fsspec.get_filesystem_class(name).clear_instance_cache()


def resolve(url: str) -> tuple[Any, str]:
  """Returns the file system of a URL, and the name in it."""
  fs = _file_system(url.partition("://")[0])
  return fs, fs._strip_protocol(url).rstrip("/")


def children(url: str) -> tuple[dict[str, FileInfo], list[str]]:
  """Returns the files of a folder, by name, and the names of its subfolders."""
  fs, root = resolve(url)
  rows = {row["name"].rstrip("/"): row for row in fs.ls(root, detail=True)}
  rows.pop(root, None)  # some stores list the folder itself
  names = {path.rpartition("/")[2]: row for path, row in rows.items()}
  found = {name: info_of(row) for name, row in names.items() if row["type"] == "file"}
  return found, [name for name, row in names.items() if row["type"] == "directory"]


def cat_ranges(ranges: list[Range]) -> list[Any]:
  """Returns the bytes, or the exception, of each range of one remote file system."""
  fs, _ = resolve(str(ranges[0][0]))
  names = [fs._strip_protocol(str(path)) for path, _, _ in ranges]
  starts, stops = [r[1] for r in ranges], [r[2] for r in ranges]
  if fs.async_impl:
    found = fs.cat_ranges(names, starts, stops, batch_size=IN_FLIGHT, on_error="return")
    return [b"" if _is_past_end(data) else data for data in found]

  def fetch(name: str, start: int, stop: int) -> Any:
    try:
      if str(ranges[0][0]).startswith("hf://"):
        return hub_ranges.read(fs, name, start, stop)
      return fs.cat_file(name, start=start, end=stop, cache_type="none")  # reads nothing ahead
    except Exception as e:
      return e

  with ThreadPoolExecutor(min(IN_FLIGHT, len(names))) as pool:
    return list(pool.map(fetch, names, starts, stops))


def _is_past_end(data: object) -> bool:
  """Returns True for the error of a range that starts after the end of its file (status 416)."""
  if not isinstance(data, Exception):
    return False
  return retries.status_of(data) == 416 or "range is not satisfiable" in str(data)


def info_of(found: dict[str, Any]) -> FileInfo:
  """Returns the FileInfo for fsspec's description of a file."""
  lfs = found.get("lfs")
  checksums = [lfs["sha256"]] if lfs else [found[key] for key in CHECKSUMS if found.get(key)]
  return FileInfo(int(found["size"]), str(checksums[0]).strip('"') if checksums else "")
