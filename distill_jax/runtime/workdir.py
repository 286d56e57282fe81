"""The folder of a run: its lock, config and package versions."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from distill_jax import config as configs
from distill_jax.errors import InputError
from distill_jax.runtime import distributed, storage
from distill_jax.runtime.json_io import read_object, write_json
from distill_jax.types import JsonObject

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array-record", "numpy")
OWN_FILES = {"config.json", "versions.json", ".jax_cache"}
DAMAGED = "Restore the file, or choose another --workdir"
# Sections and keys that may change between calls, because they do not affect the results.
MAY_CHANGE = (
  "mesh",
  "evaluate",
  "evals",
  "export",
  "efficiency",
  "inspect",
  "pack",
  "preflight",
  "profile_steps",
  "filter.slice",
  "filter.workers",
  "generate.batch_size",
  "generate.gather",
  "generate.prefill_rows",
  "on_policy.keep_rounds",
  "on_policy.max_drift",
  "on_policy.max_repetition",
  "on_policy.max_truncated",
  "on_policy.min_overlap",
  "records.heldout_sequences",  # recorded into another folder
  "records.tokens_per_shard",  # a store keeps its own
  "retarget.dry_run",
  "retarget.slice",
  "retarget.workers",
  "train.checkpoint_every",
  "train.checkpoint_minutes",
  "train.keep",
  "train.keep_every",
  "train.tracker",
)


class Workdir:
  """Context manager that locks a folder for one run: `with Workdir(path, config) as folder:`.

  It writes config.json and versions.json. A run of several processes holds one lock. If the first
  command in a folder raises InputError before it has written anything there, the two files are
  removed, so that the corrected command can use the folder. A run of a part leaves them to others.

  Args:
    path: The folder, which is created if it does not exist.
    config: The config of the run.
    part: The part of the work of this run: runs of different parts share the folder, as long as no
      run of the whole uses it.

  Raises:
    InputError: Another run holds the lock, or the folder holds a run with another config.
  """

  def __init__(self, path: str | Path, config: configs.Config, part: str = ""):
    self.path, self._part = Path(path), part
    self.config = as_in_file(config)

  def __enter__(self) -> Path:
    self._locks: contextlib.ExitStack | None = None
    self._before: set[str] | None = None  # the files in a folder that held no run
    distributed.run_on_process_0(self._take)
    storage.share(self.path / "config.json")
    return self.path

  def _take(self) -> None:
    self.path.mkdir(parents=True, exist_ok=True)
    locks = contextlib.ExitStack()
    with locks:
      if self._part:
        self._locked(locks, ".lock", fcntl.LOCK_SH)
      self._locked(locks, f".lock{self._part}", fcntl.LOCK_EX)
      self._check()
      self._locks = locks.pop_all()
    write_json(self.path / "versions.json", versions())

  def _locked(self, locks: contextlib.ExitStack, name: str, mode: int) -> None:
    """Locks a file until `locks` is closed, and writes this process into it."""
    lock = locks.enter_context((self.path / name).open("a+"))
    try:
      fcntl.flock(lock, mode | fcntl.LOCK_NB)
    except BlockingIOError:
      lock.seek(0)
      holder = lock.read().strip() or "unknown"
      raise InputError(
        f"{self.path} is in use by another process (pid {holder}). Wait for it, or choose another "
        "--workdir."
      ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    if self._locks is None:
      return
    is_refused = kind is not None and issubclass(kind, InputError) and not self._part
    if is_refused and self._before == self._files():  # other parts may share config.json
      (self.path / "config.json").unlink()
      (self.path / "versions.json").unlink()
    self._locks.close()

  def _files(self) -> set[str]:
    """Returns the names in the folder, except those that this class writes."""
    names = {entry.name for entry in self.path.iterdir()}
    return {name for name in names if not name.startswith(".lock")} - OWN_FILES

  def _check(self) -> None:
    file = self.path / "config.json"
    if not file.exists():
      self._before = self._files()
      write_json(file, self.config)
      return
    tree = _read(file)
    with contextlib.suppress(InputError):  # if it has unknown keys, the error below names one
      tree = as_in_file(configs.from_dict(tree))  # with the defaults of keys that it lacks
    for key, was, now in _differences(tree, self.config, ""):
      if key not in MAY_CHANGE and key.split(".")[0] not in MAY_CHANGE:
        raise InputError(
          f"{storage.location(self.path)} holds a run with {key}={was!r}, but this config has "
          f"{now!r}. Choose another --workdir, or use the same config."
        )


def read_config(path: str | Path) -> configs.Config:
  """Returns the config of the run in a folder.

  Raises:
    InputError: The folder does not hold a run, or its config is damaged or has unknown keys.
  """
  file = Path(path) / "config.json"
  if not file.exists():
    raise InputError(f"{path} does not hold a run: {file.name} is missing. Train there first.")
  tree = _read(file)
  try:
    return configs.from_dict(tree)
  except InputError as error:
    raise InputError(
      f"{file} does not fit this version of distill_jax: {error} Train again in another "
      "--workdir, or use the version in versions.json."
    ) from error


def as_in_file(config: configs.Config) -> JsonObject:
  """Returns the content of the config.json of a resolved config, with lists for tuples."""
  return json.loads(json.dumps(configs.to_dict(config)))


def _read(file: Path) -> JsonObject:
  """Returns a config.json with the keys of this version."""
  tree = read_object(file, DAMAGED)
  records = tree.get("records", {})
  if (sequences := records.pop("sequences_per_shard", 0)) and "seq_len" in tree.get("data", {}):
    records["tokens_per_shard"] = sequences * tree["data"]["seq_len"]
  return tree


def versions() -> JsonObject:
  """Returns the command, time, package versions, platform and git revision of a run."""
  return {
    "command": sys.argv,
    "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    "python": platform.python_version(),
    "platform": platform.platform(),
    "git": _git_revision(),
    "packages": {name: metadata.version(name) for name in PACKAGES},
  }


def _git_revision() -> str:
  """Returns the git revision, with "-dirty" if files are modified; "" outside a checkout."""
  folder = Path(__file__).parent
  command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
  try:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
  except FileNotFoundError:  # git is not installed
    return ""
  return done.stdout.strip()


def _differences(was: Any, now: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
  """Yields (dotted key, old value, new value) for the values that differ."""
  if isinstance(was, dict) and isinstance(now, dict):
    for key in sorted(set(was) | set(now)):
      yield from _differences(was.get(key), now.get(key), f"{path}.{key}" if path else key)
  elif was != now:
    yield path, was, now
