"""The files of sentence-transformers, which define the embedding of a text."""

from __future__ import annotations

import os

from distill_jax.errors import InputError, bad_value
from distill_jax.hub.weights import read_hf_json
from distill_jax.runtime import files, json_io
from distill_jax.types import JsonObject

MODULES = "modules.json"
KINDS = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}  # by folder
KEYS = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
ACTION = "Use another model"


def read_pooling(folder: str | os.PathLike[str]) -> str:
  """Returns "mean" for the mean over a text's tokens, or "cls" for its first token.

  Args:
    folder: a path or URL, with modules.json.

  Raises:
    InputError: embeddings are computed in another way, or the files are damaged.
  """
  path = files.join(folder, MODULES)
  action = "download the file again"
  try:
    modules = json_io.parse(files.read(path), path, action)
    kinds = {m["type"].rpartition(".")[2]: m["path"] for m in modules}
  except (TypeError, KeyError, AttributeError) as e:
    raise InputError(f"{path} is not a list of modules ({e!r}). Download the file again.") from e
  if others := sorted(kinds.keys() - set(KINDS.values())):
    raise bad_value(f"{path}: type", others[0], f"one of {', '.join(KINDS.values())}", ACTION)
  if "Pooling" not in kinds:
    raise InputError(f"{path} has no module Pooling. {ACTION}.")
  path = files.join(files.join(folder, kinds["Pooling"]), "config.json")
  hf = {KEYS["mean"]: True, **read_hf_json(path)}  # its default in sentence-transformers
  on = [key for key, value in hf.items() if key.startswith("pooling_mode_") and value]
  found = [hf["pooling_mode"]] if hf.get("pooling_mode") else on
  for name, key in KEYS.items():
    if found in ([name], [key]):
      return name
  raise bad_value(f"{path}: the pooling", found, f"one of {', '.join(KEYS.values())}", ACTION)


def content(pooling: str, width: int) -> JsonObject:
  """Returns the files of a model whose embeddings are normalised, by name.

  Args:
    pooling: "mean" or "cls"; see `read_pooling`.
    width: the width of the embeddings.
  """
  modules = [
    {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
    for i, (path, kind) in enumerate(KINDS.items())
  ]
  modes = {key: name == pooling for name, key in KEYS.items()}
  return {
    MODULES: modules,
    "1_Pooling/config.json": {"word_embedding_dimension": width, **modes},
  }
