"""Opens a checkpoint, a Hugging Face folder or a GGUF file, and reads everything but weights."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
from concurrent.futures import ThreadPoolExecutor
from typing import cast

from distill_jax import registry
from distill_jax.errors import InputError
from distill_jax.hub import float8, prefixed, timm_vit
from distill_jax.hub.gguf_tokenizer import tokenizer_files
from distill_jax.hub.locate import locate
from distill_jax.hub.safetensors_folder import SafetensorsFolder
from distill_jax.hub.tokenizer import TokenizerFiles, check_vocabulary, read_tokenizer
from distill_jax.hub.weights import Weights, read_hf_json
from distill_jax.types import FamilyConfig, JsonObject, TextConfig

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """An open checkpoint, whose weights have not been read.

  Attributes:
    source: its source in the config.
    family: the module in distill_jax.models.
    config: the architecture config.
    weights: the reader of its tensors.
    tokenizer: the files of its tokenizer; None if it lacks one.
    generation: the content of generation_config.json, with the ids of special tokens.
  """

  source: str
  family: str
  config: FamilyConfig
  weights: Weights
  tokenizer: TokenizerFiles | None
  generation: JsonObject

  @functools.cached_property
  def digest(self) -> str:
    """The SHA-256 digest, in hex, of the config and of the weight files in order of their names."""

    def file_sha256(path: pathlib.Path) -> bytes:
      with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").digest()

    total = hashlib.sha256(json.dumps(self.config.to_hf(), sort_keys=True).encode())
    with ThreadPoolExecutor(8) as pool:  # hashing releases the GIL
      for file_digest in pool.map(file_sha256, self.weights.files):
        total.update(file_digest)
    return total.hexdigest()


def open_model(source: str) -> Pretrained:
  """Opens a model and reads everything but its weights.

  Args:
    source: the source of a .gguf file or a Hugging Face folder; see `locate`.

  Raises:
    InputError: The model does not exist or cannot be read, its architecture is not supported, or
      its tokenizer does not fit the weights.
  """
  path = locate(source)
  if path.is_dir():
    if not (path / "config.json").exists():
      raise InputError(
        f"{path} does not contain a config.json. Use a Hugging Face folder or a .gguf file."
      )
    hf = read_hf_json(path / "config.json")
    from_timm = timm_vit.is_plain_vit(hf)
    family = "vit" if from_timm else _family(hf, path)
    weights: Weights = float8.scaled(SafetensorsFolder(path), hf.get("quantization_config"), path)
    if from_timm:
      hf, weights = timm_vit.read(weights, path)
    tokenizer = read_tokenizer(path)
    extra = path / "generation_config.json"
    generation = read_hf_json(extra) if extra.exists() else {}
  elif path.suffix == ".gguf":
    from distill_jax.hub.gguf_file import GGUFFile  # needs an extra

    weights = file = GGUFFile(path)
    hf, tokenizer, generation = file.config(), tokenizer_files(file.meta, path), {}
    family = _family(hf, path)
  else:
    raise InputError(f"{path} is neither a folder nor a .gguf file. Use one of them.")
  config = _config(family, hf, path)
  module = registry.load("models", family)
  prefix, after = (getattr(module, name, "") for name in ("PREFIX", "AFTER"))
  weights = prefixed.prefixed(weights, prefix, after)
  if tokenizer is not None:
    check_vocabulary(tokenizer.size(), cast(TextConfig, config).vocab_size)
  ids = {k: hf[k] for k in IDS if hf.get(k) is not None}
  return Pretrained(str(source), family, config, weights, tokenizer, {**ids, **generation})


def _family(hf: JsonObject, path: pathlib.Path) -> str:
  """Returns the module in distill_jax.models for the model_type in a config.json."""
  families = {
    model_type: name
    for name in registry.names("models")
    for model_type in registry.load("models", name).HF_MODEL_TYPES
  }
  if not isinstance(model_type := hf.get("model_type"), str) or model_type not in families:
    raise InputError(
      f"{path} has model_type {model_type!r} (architectures {hf.get('architectures')}); expected "
      f"one of {', '.join(sorted(families))}. Choose a model of these families."
    )
  return families[model_type]


def _config(family: str, hf: JsonObject, path: pathlib.Path) -> FamilyConfig:
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
