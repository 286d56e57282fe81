"""Loading and exporting a model without a config: `distill_jax.load_model` and `export_model`."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import jax
from jax.sharding import Mesh

from distill_jax.data import corpus
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError, bad_value
from distill_jax.hub import export, sentence_files
from distill_jax.hub.tokenizer import TokenizerFiles
from distill_jax.models import loading, runs
from distill_jax.models.loading import LoadedModel, ModelSource
from distill_jax.models.options import ModelOptions
from distill_jax.nn import params, sharding
from distill_jax.types import JsonObject, Model, ModelInputs, Output

CARD = """---
library_name: transformers
tags: [distill_jax]
---
# {name}

Exported by distill_jax.
"""


@dataclasses.dataclass(frozen=True)
class StandaloneModel(LoadedModel):
  """A model with its tokenizer: the result of `load_model`.

  `loaded.model(inputs, loaded.compute)` returns an Output. `loaded.model` is a pytree: pass it to
  jitted functions as an argument, differentiate it, update it with optax.

  Attributes:
    source: the source that it was loaded from.
    tokenizer_files: the files of its tokenizer; None if it has none.
    generation: the contents of generation_config.json; empty without one.
    opened: the source, opened; it has the digest of the weights.
  """

  source: str
  tokenizer_files: TokenizerFiles | None
  generation: JsonObject
  opened: ModelSource

  def __call__(self, inputs: ModelInputs) -> Output:
    """Returns the model's outputs."""
    return self.model(inputs, self.compute)

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    """The model's tokenizer: `encode`, `decode`, `vocab_size`, `digest`.

    Raises:
      InputError: the model has no tokenizer.
    """
    if self.tokenizer_files is None:
      raise InputError(f"{self.source} has no tokenizer. Load one from another folder.")
    return corpus.of_files(self.tokenizer_files, self.source)

  @property
  def identity(self) -> dict[str, str]:
    """Name and digest of the weights, for the `teacher` of a Recorder. It reads the weights."""
    return self.opened.identity


def load_model(
  source: str | os.PathLike[str] = "",
  mesh: Mesh | None = None,
  *,
  dtype: str = "float32",
  param_dtype: str = "float32",
  seed: int = 0,
  **options: Any,
) -> StandaloneModel:
  """Loads a model and its tokenizer.

  Args:
    source: a Hugging Face folder, a .gguf file, "hub:ORG/NAME", "package:NAME/PATH",
      "run:WORKDIR" for the student of a training run, "run:WORKDIR@best" for its best checkpoint,
      or a URL. "": random weights of `family` and `shape`.
    mesh: the devices that hold the parameters, a mesh with axes (data, fsdp, tensor) such as
      `make_mesh()` returns; None: the first device. Call the model under `jax.set_mesh(mesh)`.
    dtype: dtype of matrix products and activations.
    param_dtype: dtype of the parameters.
    seed: seed of parameters that are initialised randomly.
    **options: other keys of `teacher` in a config, e.g. family="llama", shape="tiny",
      keep_layers=(0, 2), remat="full".

  Raises:
    InputError: the source does not exist or is not a model that this package reads.
  """
  known = {field.name for field in dataclasses.fields(ModelOptions)}
  if unknown := sorted(set(options) - known):
    raise bad_value(
      "an option of load_model",
      unknown[0],
      f"one of {', '.join(sorted(known))}",
      "Correct its name",
    )
  mesh = sharding.make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
  if tuple(mesh.axis_names) != sharding.MESH_AXES:
    raise bad_value(
      "mesh",
      tuple(mesh.axis_names),
      f"a mesh with axes {sharding.MESH_AXES}",
      "Make it with distill_jax.make_mesh",
    )
  spec = ModelOptions(source=str(source), dtype=dtype, param_dtype=param_dtype, **options)
  opened = loading.open_source(spec, seed)
  files = _tokenizer_files(opened)
  loaded = opened.load(mesh, runs.keys(seed)["teacher"])
  fields = {field.name: getattr(loaded, field.name) for field in dataclasses.fields(loaded)}
  return StandaloneModel(
    **fields,
    source=opened.name,
    tokenizer_files=files,
    generation=opened.generation,
    opened=opened,
  )


def export_model(
  model: Model | LoadedModel,
  folder: str | os.PathLike[str],
  like: str | os.PathLike[str] | StandaloneModel | None = None,
  *,
  dtype: str = "bfloat16",
  card: str = "",
) -> JsonObject:
  """Writes a model as a Hugging Face folder that `transformers` loads.

  Args:
    model: the model, or the result of `load_model`, with its current parameters.
    folder: the folder or URL to write; it must not exist.
    like: the source of the tokenizer and of generation_config.json: a result of `load_model`, or
      a source. None: `model` if it is a result of `load_model`; otherwise these files are not
      written.
    dtype: dtype of the tensors: "float32", "bfloat16" or "float16".
    card: README.md of the folder, in Markdown; "" writes a short one.

  Returns:
    {"export_dir": the folder, "parameters": the number of parameters}.

  Raises:
    InputError: the folder exists, the disk is full, or `like` is not a model.
  """
  if like is None and isinstance(model, StandaloneModel):
    like = model
  files, generation = None, {}
  if isinstance(like, StandaloneModel):
    files, generation = like.tokenizer_files, like.generation
  elif like is not None:
    opened = loading.open_source(ModelOptions(source=str(like)))
    files, generation = _tokenizer_files(opened), opened.generation
  bare = model.model if isinstance(model, LoadedModel) else model
  pooling = getattr(bare.config, "pooling", "mean")  # the default of sentence-transformers
  extra = sentence_files.content(pooling, bare.config.hidden_size) if pooling != "mean" else None
  name = str(folder).rstrip("/").rpartition("/")[2]
  export.export_model(
    bare,
    folder,
    tokenizer=files,
    generation=generation,
    card=card or CARD.format(name=name),
    dtype=dtype,
    extra=extra,
  )
  return {"export_dir": str(folder), "parameters": params.count(bare)}


def _tokenizer_files(opened: ModelSource) -> TokenizerFiles | None:
  """Returns the files of a source's tokenizer, which the config of a run may name, or None."""
  if opened.run is None:
    return opened.tokenizer
  return corpus.files_of(opened.run.config.data, opened.pretrained)
