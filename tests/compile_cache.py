"""The folder of compiled programs that all test runs of a checkout share.

Compiling takes most of a test's time. The folder is `.cache/jax-VERSION-PROCESSOR`, because a
program that one version of jax compiled for one processor is of no use to another.
JAX_COMPILATION_CACHE_DIR names another folder.
"""

import importlib.metadata
import os
import platform
import re
import time
import zlib
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".cache"
MAX_AGE_S = 14 * 24 * 3600


def processor() -> str:
  """Returns the instruction set of this machine, extensions included, as a short name."""
  info = Path("/proc/cpuinfo")
  flags = re.search(r"^(flags|Features)\s*:(.*)$", info.read_text() if info.exists() else "", re.M)
  extensions = " ".join(sorted(flags[2].split())) if flags else ""
  return f"{platform.machine()}-{zlib.crc32(extensions.encode()):08x}"


def prune(cache: Path, now: float) -> None:
  """Deletes the files that were not read for two weeks.

  File systems that do not keep the time of reading count from the time of writing.
  """
  for path in cache.glob("jax-*/*"):
    try:
      about = path.stat()
      if now - max(about.st_atime, about.st_mtime) > MAX_AGE_S:
        path.unlink()
    except FileNotFoundError:  # another test run deleted it
      pass


def use(cache: Path = CACHE) -> None:
  """Sets JAX_COMPILATION_CACHE_DIR for this process and those that it starts.

  Has an effect only before jax is imported.
  """
  if "JAX_COMPILATION_CACHE_DIR" in os.environ:  # a worker of pytest-xdist, or the caller's choice
    return
  prune(cache, time.time())
  folder = cache / f"jax-{importlib.metadata.version('jax')}-{processor()}"
  os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
