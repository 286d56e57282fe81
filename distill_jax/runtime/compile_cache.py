"""The compiled programs of a run, kept in its workdir.

A run that starts again, also on new machines, reads its programs instead of compiling them, which
takes minutes for a large model. The programs are in WORKDIR/.jax_cache, or in this folder of the
URL, so that they are not part of what is mirrored. Process 0 writes each program once; the other
processes read it. JAX_COMPILATION_CACHE_DIR names another folder.

A start of a run adds a few programs of 1 to 50 MB each. When a folder holds more than MAX_BYTES,
the programs of former code, meshes and versions outweigh those in use, and it is emptied.
"""

from __future__ import annotations

import os
import platform
import re
import zlib
from pathlib import Path

import jax

from distill_jax.runtime import distributed, files

FOLDER = ".jax_cache"
MAX_BYTES = 2 * 2**30


def use(workdir: str | os.PathLike[str]) -> None:
  """Lets jax keep its compiled programs in a workdir. Call it before anything is compiled.

  Does nothing if the user has chosen a folder (JAX_COMPILATION_CACHE_DIR), and for URLs that jax
  does not write to.

  Args:
    workdir: The folder or URL of the run.
  """
  url = str(workdir).removeprefix("file://").rstrip("/")
  remote = files.is_remote(url)
  chosen = jax.config.values["jax_compilation_cache_dir"]
  if chosen or (remote and not url.startswith(("gs://", "s3://"))):
    return
  folder = f"{url if remote else Path(url).absolute()}/{FOLDER}/{processor()}"
  distributed.run_on_process_0(lambda: empty_if_full(folder))
  if remote:  # XLA's own cache of tuned kernels does not write to URLs
    jax.config.update("jax_persistent_cache_enable_xla_caches", "")
  jax.config.update("jax_compilation_cache_dir", folder)


def empty_if_full(folder: str) -> None:
  """Removes the programs in a folder if they take more than MAX_BYTES."""
  if sum(info.size for info in files.listing(folder).values()) > MAX_BYTES:
    files.remove_tree(folder)


def processor() -> str:
  """Returns the instruction set of this machine, extensions included, as a short name.

  Programs contain code for the host's processor, which another kind of processor cannot run.
  """
  info = Path("/proc/cpuinfo")
  text = info.read_text() if info.exists() else ""
  found = re.search(r"^(flags|Features)\s*:(.*)$", text, re.MULTILINE)
  extensions = " ".join(sorted(found[2].split())) if found else ""
  return f"{platform.machine()}-{zlib.crc32(extensions.encode()):08x}"
