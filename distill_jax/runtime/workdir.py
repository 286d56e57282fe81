"""A run's folder: locked by one process, of one config, with the versions that made it."""

from __future__ import annotations

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
from typing import IO, Any

from distill_jax import config as configs
from distill_jax.errors import InputError
from distill_jax.runtime import distributed
from distill_jax.runtime.json_io import read_object, write_json
from distill_jax.types import JsonObject

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array-record", "numpy")
DAMAGED = "bring the file back, or choose another --workdir"
# A run may continue with these changed: they do not decide what is computed.
MAY_CHANGE = (
  "mesh",
  "evaluate",
  "evals",
  "export",
  "efficiency",
  "inspect",
  "preflight",
  "profile_steps",
)


class Workdir:
  """Takes a folder for one run, of however many processes: `with Workdir(path, config):`.

  Raises:
    InputError: another process holds the folder, or it holds a run of another config.
  """

  def __init__(self, path: str | Path, config: configs.Config):
    self.path = Path(path)
    self.config = json.loads(json.dumps(configs.to_dict(config)))  # as the file will have it

  def __enter__(self) -> Path:
    self._lock: IO[str] | None = None
    distributed.run_on_process_0(self._take)
    return self.path

  def _take(self) -> None:
    self.path.mkdir(parents=True, exist_ok=True)
    self._lock = (self.path / ".lock").open("a+")
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      self._lock.seek(0)
      holder = self._lock.read().strip() or "unknown"
      self._lock.close()
      raise InputError(
        f"workdir {self.path} is held by another process (pid {holder}); wait for it or choose "
        f"another --workdir"
      ) from None
    try:
      self._check()
    except BaseException:
      self._lock.close()
      raise
    self._lock.truncate(0)
    self._lock.write(str(os.getpid()))
    self._lock.flush()
    write_json(self.path / "versions.json", versions())

  def __exit__(self, *_: object) -> None:
    if self._lock is not None:
      self._lock.close()

  def _check(self) -> None:
    file = self.path / "config.json"
    if not file.exists():
      write_json(file, self.config)
      return
    for key, was, now in _differences(read_object(file, DAMAGED), self.config, ""):
      if key.split(".")[0] not in MAY_CHANGE:
        raise InputError(
          f"workdir {self.path} holds a run with {key}={was!r} and this config has {now!r}; "
          f"choose another --workdir or the same config"
        )


def read_config(path: str | Path) -> configs.Config:
  """Returns the config of the run in a folder.

  Raises:
    InputError: there is no run, or its config is damaged or has keys that are unknown today.
  """
  file = Path(path) / "config.json"
  if not file.exists():
    raise InputError(f"{path} holds no run: there is no {file.name} in it; train there first")
  tree = read_object(file, DAMAGED)
  try:
    return configs.from_dict(tree)
  except InputError as error:
    raise InputError(
      f"{file} does not fit this version of distill_jax: {error}. Train again in another "
      "--workdir, or use the version that versions.json names"
    ) from error


def versions() -> JsonObject:
  """Returns what made a run: command, packages, platform and git revision."""
  return {
    "command": sys.argv,
    "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    "python": platform.python_version(),
    "platform": platform.platform(),
    "git": _git_revision(),
    "packages": {name: metadata.version(name) for name in PACKAGES},
  }


def _git_revision() -> str:
  """Returns the source's revision, with "-dirty" if it was edited; "" outside a checkout."""
  folder = Path(__file__).parent
  command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
  try:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
  except FileNotFoundError:  # a machine without git
    return ""
  return done.stdout.strip()


def _differences(was: Any, now: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
  """Yields (dotted key, former value, new value) of the values that differ."""
  if isinstance(was, dict) and isinstance(now, dict):
    for key in sorted(set(was) | set(now)):
      yield from _differences(was.get(key), now.get(key), f"{path}.{key}" if path else key)
  elif was != now:
    yield path, was, now
