"""The folder is the registry: a name in a config is a module in a folder."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from distill_jax.errors import InputError


def names(package: str) -> list[str]:
  """The modules of `distill_jax.<package>`, sorted."""
  path = importlib.import_module(f"distill_jax.{package}").__path__
  return sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))


def load(package: str, name: str) -> ModuleType:
  """Imports `distill_jax.<package>.<name>`, or says which names there are."""
  if name not in (known := names(package)):
    raise InputError(f"there is no {name!r} in distill_jax/{package}; it holds {', '.join(known)}")
  return importlib.import_module(f"distill_jax.{package}.{name}")
