"""Registries: a name in a config is a module in a folder, e.g. `kd` in distill_jax/losses."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from distill_jax.errors import InputError, bad_value

# Packages whose modules are entries of the config, and the dataclass that each module defines.
# The class name in lower case is the key that names the module: {"loss": "kd", "weight": 1.0}.
ENTRY_CLASSES = {
  "losses": "Loss",
  "filters": "Filter",
  "evals": "Benchmark",
  "tasks": "Task",
  "augmentations": "Augmentation",
}


def names(package: str) -> list[str]:
  """Returns the entries of `distill_jax.<package>`, sorted.

  Every module is an entry, except `options`, modules whose names begin with "_", and the modules
  in the package's SHARED, which the entries use.
  """
  folder = importlib.import_module(f"distill_jax.{package}")
  shared = ("options", *vars(folder).get("SHARED", ()))
  modules = [m.name for m in pkgutil.iter_modules(folder.__path__)]
  return sorted(m for m in modules if not m.startswith("_") and m not in shared)


def load(package: str, name: str) -> ModuleType:
  """Imports `distill_jax.<package>.<name>`.

  Raises:
    InputError: the package has no such entry.
  """
  if name not in (known := names(package)):
    near = difflib.get_close_matches(name, known, 1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Its modules are {', '.join(known)}."
    raise InputError(f"distill_jax/{package} has no module {name!r}. {hint}")
  return importlib.import_module(f"distill_jax.{package}.{name}")


def add_folder(package: str, folder: str | Path) -> None:
  """Makes the modules of a folder entries of `distill_jax.<package>`, next to its own.

  Call it in a config file, to use losses, tasks, filters or model families that are not part of
  distill_jax. Adding a folder twice changes nothing.

  Args:
    package: The package, e.g. "losses".
    folder: The folder that holds the modules.

  Raises:
    InputError: The folder does not exist.
  """
  path = str(Path(folder).resolve())
  if not Path(path).is_dir():
    raise bad_value("folder", str(folder), "an existing folder", "Correct the path")
  search_path = importlib.import_module(f"distill_jax.{package}").__path__
  if path not in search_path:
    search_path.append(path)


def use_folders(package: str, folders: Sequence[str]) -> None:
  """Makes the entries of `distill_jax.<package>` those of some folders, in another process.

  Args:
    package: The package.
    folders: Its folders, with those of `add_folder`.
  """
  importlib.import_module(f"distill_jax.{package}").__path__[:] = folders
