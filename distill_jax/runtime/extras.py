"""Optional packages: which extra installs each, and the error where one is missing."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

from distill_jax.errors import InputError

# The distribution that holds a module, where the two have different names.
DISTRIBUTIONS = {"PIL": "pillow", "absl": "absl-py", "orbax": "orbax-checkpoint"}


@contextlib.contextmanager
def needed(extra: str) -> Iterator[None]:
  """Wraps imports of packages that an extra of distill-jax installs.

  Args:
    extra: The extra's name in pyproject.toml.

  Raises:
    InputError: A package cannot be imported; the message has the command that installs it.

  Example:
    >>> with needed("images"):
    ...   from PIL import Image
  """
  try:
    yield
  except ModuleNotFoundError as e:
    raise missing(e.name or extra, extra) from e
  except ImportError as e:
    raise InputError(
      f"{distribution(e.name or extra)} cannot be imported ({e}). {install(extra)}."
    ) from e


def missing(module: str, extra: str) -> InputError:
  """Returns the error for a module that is not installed."""
  return InputError(
    f"{distribution(module)} is not installed; expected the packages of the extra {extra!r}. "
    f"{install(extra)}."
  )


def install(extra: str) -> str:
  """Returns the instruction that installs an extra, without a full stop."""
  return f"Run pip install 'distill-jax[{extra}]'"


def not_installed(*modules: str) -> list[str]:
  """Returns those of the top-level modules that cannot be found, without importing any."""
  return [m for m in modules if importlib.util.find_spec(m) is None]


def distribution(module: str) -> str:
  """Returns the name under which pip installs a module."""
  top = module.partition(".")[0]
  return DISTRIBUTIONS.get(top, top.replace("_", "-"))
