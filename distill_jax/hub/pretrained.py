"""Opens a checkpoint, a Hugging Face folder or a GGUF file, and reads everything but weights.

The tokenizer, the config and the generation settings are small files, which are read by
themselves. The files of weights are first touched when weights are read: their headers, and then
the ranges of the tensors.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import cast

from distill_jax import registry
from distill_jax.errors import InputError
from distill_jax.hub import compressed, float8, identity, renamed, sentence_files, timm_vit
from distill_jax.hub.gguf_tokenizer import tokenizer_files
from distill_jax.hub.locate import locate
from distill_jax.hub.safetensors_folder import SafetensorsFolder
from distill_jax.hub.tokenizer import TokenizerFiles, check_vocabulary, read_tokenizer
from distill_jax.hub.weights import Weights, read_hf_json
from distill_jax.runtime import files
from distill_jax.types import FamilyConfig, JsonObject, TextConfig

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """An open checkpoint, whose weights have not been read.

  Attributes:
    source: its source in the config.
    family: the module in distill_jax.models.
    config: the architecture config.
    open_weights: opens the files of weights, and reads their headers.
    tokenizer: the files of its tokenizer; None if it lacks one.
    generation: the content of generation_config.json, with the ids of special tokens.
  """

  source: str
  family: str
  config: FamilyConfig
  open_weights: Callable[[], Weights]
  tokenizer: TokenizerFiles | None
  generation: JsonObject

  @functools.cached_property
  def weights(self) -> Weights:
    """The reader of its tensors."""
    return self.open_weights()

  @functools.cached_property
  def digest(self) -> str:
    """The SHA-256 digest, in hex, of its content; see identity.py."""
    return identity.digest(self.config, self.weights.files)


def open_model(source: str) -> Pretrained:
  """Opens a model and reads everything but its weights, once per process while it is unchanged.

  Args:
    source: the source of a .gguf file or a Hugging Face folder; see `locate`.

  Raises:
    InputError: The model does not exist or cannot be read, its architecture is not supported, or
      its tokenizer does not fit the weights.
  """
  location = locate(source)
  there = files.listing(location)
  if there or pathlib.Path(location).is_dir():
    return _open_folder(str(source), location, tuple(there.items()))
  if location.endswith(".gguf") and not files.is_remote(location):
    return _open_gguf(str(source), location, cast(files.FileInfo, files.info(location)))
  raise InputError(
    f"{location} is neither a Hugging Face folder nor a .gguf file on this machine. Use one of "
    "them."
  )


@functools.lru_cache(maxsize=16)
def _open_folder(
  source: str, folder: str, there: tuple[tuple[str, files.FileInfo], ...]
) -> Pretrained:
  """Opens a Hugging Face folder; `there` are its files, which are part of the key of the cache."""
  names = dict(there)
  if "config.json" not in names:
    raise InputError(
      f"{folder} does not contain a config.json. Use a Hugging Face folder or a .gguf file."
    )
  hf = read_hf_json(files.join(folder, "config.json"))
  if hf.get("architectures") == ["BertModel"] and sentence_files.MODULES in names:
    hf["pooling"] = sentence_files.read_pooling(folder)
  tokenizer = read_tokenizer(folder)
  extra = "generation_config.json"
  generation = read_hf_json(files.join(folder, extra)) if extra in names else {}

  quantization = hf.get("quantization_config")
  scheme = compressed.scheme_of(quantization, folder)
  block = None if scheme else float8.block_size(quantization, folder)

  def open_weights() -> Weights:
    weights = SafetensorsFolder(folder)
    if scheme:
      return compressed.IntegerWeights(weights, scheme)
    return float8.BlockScaled(weights, block) if block else weights

  if timm_vit.is_plain_vit(hf):  # its sizes are in the headers of the weights
    hf, timm_weights = timm_vit.read(open_weights(), folder)
    return _opened(source, folder, hf, lambda: timm_weights, tokenizer, generation)
  return _opened(source, folder, hf, open_weights, tokenizer, generation)


@functools.lru_cache(maxsize=16)
def _open_gguf(source: str, path: str, version: files.FileInfo) -> Pretrained:
  """Opens a GGUF file; its version is part of the key of the cache."""
  del version
  from distill_jax.hub.gguf_file import GGUFFile  # needs an extra

  file = GGUFFile(pathlib.Path(path))
  tokenizer = tokenizer_files(file.meta, pathlib.Path(path))
  return _opened(source, path, file.config(), lambda: file, tokenizer, {})


def _opened(
  source: str,
  location: str,
  hf: JsonObject,
  open_weights: Callable[[], Weights],
  tokenizer: TokenizerFiles | None,
  generation: JsonObject,
) -> Pretrained:
  """Returns a checkpoint with the content `hf` of its config.json."""
  family = _family(hf, location)
  config = _config(family, hf, location)
  module = registry.load("models", family)
  prefix, after = (getattr(module, name, "") for name in ("PREFIX", "AFTER"))
  starts = getattr(module, "OTHER_STARTS", {})
  if tokenizer is not None:
    tokenizer = tokenizer.without(getattr(module, "UNREAD_TOKENS", ()))
    check_vocabulary(tokenizer.size(), cast(TextConfig, config).vocab_size)
  # An id that is null stays null in exports; transformers replaces a missing id by its default.
  ids = {k: hf[k] for k in IDS if k in hf}
  return Pretrained(
    source,
    family,
    config,
    lambda: renamed.renamed(open_weights(), prefix, after, starts),
    tokenizer,
    {**ids, **generation},
  )


def _family(hf: JsonObject, path: str) -> str:
  """Returns the module in distill_jax.models for the model_type in a config.json."""
  families = {
    model_type: name
    for name in registry.names("models")
    for model_type in registry.load("models", name).HF_MODEL_TYPES
  }
  if "model_type" not in hf and "student" in hf:  # the config of a command
    raise InputError(
      f"{path} is a workdir, not a model. If `train` wrote it, name it as run:{path}; if not, name "
      "a folder in it."
    )
  if not isinstance(model_type := hf.get("model_type"), str) or model_type not in families:
    raise InputError(
      f"{path} has model_type {model_type!r} (architectures {hf.get('architectures')}); expected "
      f"one of {', '.join(sorted(families))}. Choose a model of these families."
    )
  return families[model_type]


def _config(family: str, hf: JsonObject, path: str) -> FamilyConfig:
  try:
    return registry.load("models", family).Config.from_hf(hf)
  except InputError as e:
    raise InputError(f"{path}: {e}") from e
  except KeyError as e:
    message = f"The config.json of {path} lacks {e}, which {family} models need. Download it again."
    raise InputError(message) from e
  except (TypeError, ValueError, AttributeError, ArithmeticError) as e:
    message = f"The config.json of {path} has a value of the wrong type ({e}). Download it again."
    raise InputError(message) from e
