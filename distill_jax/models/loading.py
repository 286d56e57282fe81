"""A model from its entry in a config: random, imported, or out of a run."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
from flax import nnx
from jax.sharding import Mesh

from distill_jax import registry
from distill_jax.errors import InputError
from distill_jax.hub.load import Overrides, check_layers, load_model
from distill_jax.hub.pretrained import Pretrained, open_model
from distill_jax.hub.tokenizer import TokenizerFiles
from distill_jax.models import DecoderConfig, DecoderModel, trainables
from distill_jax.models.options import ModelOptions, StudentOptions
from distill_jax.models.runs import RUN, Run, run_folder
from distill_jax.models.trainables import LayerSharing, Trainable
from distill_jax.nn import params, sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.nn.quantise import QuantiseOptions
from distill_jax.runtime import workdir
from distill_jax.types import FamilyConfig, JsonObject, Model, PyTree, TextConfig

ConfigT = TypeVar("ConfigT", bound=Any)  # a frozen dataclass: a family's Config or one inside it


@dataclasses.dataclass(frozen=True)
class LoadedModel:
  """A model in memory, with how it is computed and what came with its weights."""

  model: Model
  config: FamilyConfig
  compute: ComputeConfig
  pretrained: Pretrained | None  # tokenizer, generation config, digest; None if random

  @property
  def text_config(self) -> TextConfig:
    """The family's Config, of a model that is known to read text."""
    return cast(TextConfig, self.config)

  @property
  def decoder_config(self) -> DecoderConfig:
    """The family's Config, of a model that is known to be a decoder."""
    return cast(DecoderConfig, self.config)

  @property
  def decoder(self) -> DecoderModel:
    """The model, of a family of decoders."""
    return cast(DecoderModel, self.model)


@dataclasses.dataclass(frozen=True, eq=False)
class ModelSource:
  """A model as a config names it, opened once: all that is known of it before weights are read.

  Made by `open_source` and passed on. Only `digest`, `identity` and `load` read weights.

  Attributes:
    options: the config's entry.
    seed: of the config, part of the identity of random weights.
    pretrained: the checkpoint that is read, or that a run's student started from; None if the
      weights are random.
    run: the run that trained the model; None unless the options name one.
  """

  options: ModelOptions
  seed: int
  pretrained: Pretrained | None = None
  run: Run | None = None

  @property
  def name(self) -> str:
    """What a person calls it: its source, or its family and shape."""
    return self.options.source or f"{self.options.family} {self.options.shape}"

  @property
  def tokenizer(self) -> TokenizerFiles | None:
    """The tokenizer that comes with the model; None without one."""
    return self.pretrained.tokenizer if self.pretrained else None

  @property
  def generation(self) -> JsonObject:
    """The contents of generation_config.json; empty without one."""
    return self.pretrained.generation if self.pretrained else {}

  @property
  def family(self) -> str:
    """The module of distill_jax.models."""
    if self.run is not None:
      return self.run.student.family
    return self.pretrained.family if self.pretrained else self.options.family

  @functools.cached_property
  def config(self) -> FamilyConfig:
    """The family's Config, with `changes` and `keep_layers` applied.

    Raises:
      InputError: the family has no such shape or field, the source is of another shape, or it
        has no such layer.
    """
    options = self.options
    if self.run is not None:
      return self.run.student.config
    if self.pretrained is None:
      config = _named_config(options)
    else:
      config = self.pretrained.config
      if options.shape:
        _check_shape(options, self.pretrained)
      check_layers(self.pretrained, options.keep_layers)
    config = apply_changes(config, options.changes)
    return config.keep_layers(options.keep_layers) if options.keep_layers else config

  @property
  def text_config(self) -> TextConfig:
    """The family's Config, of a model that is known to read text."""
    return cast(TextConfig, self.config)

  @property
  def decoder_config(self) -> DecoderConfig:
    """The family's Config, of a model that is known to be a decoder."""
    return cast(DecoderConfig, self.config)

  @functools.cached_property
  def compute(self) -> ComputeConfig:
    """How the model is computed."""
    return compute_config(self.options)

  @functools.cached_property
  def abstract(self) -> Model:
    """The model as shapes: what `load` would make, in no memory."""
    return jax.eval_shape(self._init, jax.random.key(0))

  @functools.cached_property
  def trainable(self) -> Trainable:
    """What of the student is trained."""
    assert isinstance(self.options, StudentOptions)
    return trainables.of_student(self.options)

  @functools.cached_property
  def abstract_trainable(self) -> PyTree:
    """What training changes, as shapes: the model, its shared layers, or its adapters."""
    init = functools.partial(self.trainable.init, pretrained=bool(self.options.source))
    return jax.eval_shape(init, self.abstract, key=jax.random.key(0))

  @functools.cached_property
  def digest(self) -> str:
    """sha256, in hex, of the weights; of random ones, words that name their seed.

    Raises:
      InputError: `options.digest` names another checkpoint.
    """
    if self.run is not None:
      return self.run.digest
    if self.pretrained is None:
      return f"random, seed {self.seed}"
    self.check_digest()
    return self.pretrained.digest

  @property
  def identity(self) -> dict[str, str]:
    """Name and digest, for the manifest of a store."""
    return {"name": self.name, "digest": self.digest}

  def load(self, mesh: Mesh, key: jax.Array, step: int | None = None) -> LoadedModel:
    """Returns the model with its parameters, sharded over the mesh as the rules store them.

    Of what `options` asks for, layers are shared here (and written out again); adapters and
    integers are not made.

    Args:
      key: initialises the parameters that do not come from a checkpoint.
      step: the checkpoint of a run; None is the last one.

    Raises:
      InputError: the weights do not fit the config, or are not those of `options.digest`.
    """
    loaded = self.load_initial(mesh, key, step)
    if isinstance(self.options, StudentOptions) and isinstance(self.trainable, LayerSharing):
      shared = self.start_training(loaded.model, mesh, {"student": key})
      del loaded  # its memory is that of the copy made next
      model = self.trainable.unshare(shared, mesh, self.compute)
      return LoadedModel(model, self.config, self.compute, self.pretrained)
    return loaded

  def start_training(self, model: Model, mesh: Mesh, keys: Mapping[str, jax.Array]) -> PyTree:
    """Returns what training starts from: the model, its shared layers, or its adapters.

    Args:
      model: the student, from `load_initial`.
      keys: of the run; see runs.keys.
    """
    shardings = sharding.shardings(self.abstract_trainable, mesh, self.compute.rules)
    return self.trainable.start(model, keys, shardings, bool(self.options.source))

  def load_initial(self, mesh: Mesh, key: jax.Array, step: int | None = None) -> LoadedModel:
    """Returns the model as `load` does, but with none of its layers shared."""
    spec, compute, config = self.options, self.compute, self.config
    if self.run is not None:
      model = self.run.load(mesh, compute, step)
    elif self.pretrained is not None:
      self.check_digest()
      changed = apply_changes(self.pretrained.config, spec.changes)
      overrides = Overrides(changed, spec.new, key)
      model = load_model(
        self.pretrained, mesh, compute, spec.param_dtype, spec.keep_layers, overrides
      )
    else:
      shardings = sharding.shardings(self.abstract, mesh, compute.rules)
      model = jax.jit(self._init, out_shardings=shardings)(key)
    return LoadedModel(model, config, compute, self.pretrained)

  def _init(self, key: jax.Array) -> Model:
    def cast(v: nnx.Variable) -> nnx.Variable:
      return v.replace(v[...].astype(self.options.param_dtype))

    model = registry.load("models", self.family).Model(self.config, key)
    return params.map_params(cast, model)

  def check_digest(self) -> None:
    """Refuses another checkpoint than `options.digest` names; reads the weights if it names one."""
    digest, source = self.options.digest, self.pretrained
    if digest and source is not None and source.digest != digest:
      raise InputError(
        f"{self.options.source} has digest {source.digest} and the config wants {digest}; it is "
        "another model, or a damaged file"
      )


def open_source(options: ModelOptions, seed: int = 0) -> ModelSource:
  """Opens the model that `options` names; its weights are not read.

  Args:
    seed: of the config that holds the options.

  Raises:
    InputError: it is not there or not readable, or a run is to be changed.
  """
  if options.source.startswith(RUN):
    if options.changes or options.new or options.keep_layers:
      raise InputError(
        f"{options.source} is a run, and keep_layers {options.keep_layers}, changes "
        f"{options.changes} and new {options.new} are not for runs; export it and name the folder"
      )
    run = open_run(run_folder(options.source))
    return ModelSource(options, seed, run.student.pretrained, run)
  return ModelSource(options, seed, open_model(options.source) if options.source else None)


def open_run(folder: Path) -> Run:
  """Opens the run in a folder of this machine."""
  config = workdir.read_config(folder)
  return Run(folder, config, open_source(config.student, config.seed))


def compute_config(options: ModelOptions) -> ComputeConfig:
  """Returns how the config has a model computed."""
  return ComputeConfig(
    dtype=options.dtype,
    rules=sharding.rules(options.rules),
    remat=options.remat,
    attention=options.attention,
    quantise=options.quantise if isinstance(options, StudentOptions) else QuantiseOptions(),
  )


def apply_changes(config: ConfigT, changes: JsonObject, prefix: str = "") -> ConfigT:
  """Returns a family's Config with the fields that `changes` gives.

  Args:
    changes: new values by field; of a Config inside the Config, a dict of its fields.
    prefix: where this Config lies in the family's, e.g. "vision.", for errors.

  Raises:
    InputError: the family has no such field.
  """
  fields = [f.name for f in dataclasses.fields(config)]
  values: JsonObject = {}
  for key, value in changes.items():
    if key not in fields:
      near = difflib.get_close_matches(key, fields, 1)
      hint = f"did you mean {prefix + near[0]!r}?" if near else f"there are {', '.join(fields)}"
      raise InputError(f"changes names {prefix + key!r}, which no model of this family has; {hint}")
    values[key] = tuple(value) if isinstance(value, list) else value
    if dataclasses.is_dataclass(inner := getattr(config, key)):
      if not isinstance(value, dict):
        raise InputError(f"changes gives {prefix + key} {value!r}; expected a dict of its fields")
      values[key] = apply_changes(inner, value, f"{prefix}{key}.")
  return dataclasses.replace(config, **values)


def _named_config(options: ModelOptions) -> FamilyConfig:
  shapes = registry.load("models", options.family).CONFIGS
  if options.shape not in shapes:
    raise InputError(
      f"{options.family} has no shape {options.shape!r}; it names {', '.join(shapes)}"
    )
  return shapes[options.shape]


def _check_shape(options: ModelOptions, pretrained: Pretrained) -> None:
  """Refuses a source that is not of the shape beside it, which preflight goes by."""
  no_sizes = {"max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling"}
  named, found = (
    {k: v for k, v in vars(config).items() if k not in no_sizes}
    for config in (_named_config(options), pretrained.config)
  )
  if options.family != pretrained.family or named != found:
    key = next((k for k in found if named.get(k) != found[k]), "family")
    expected, value = named.get(key, options.family), found.get(key, pretrained.family)
    raise InputError(
      f"{options.source} has {key} {value!r} and the shape beside it, {options.family} "
      f"{options.shape}, has {expected!r}; name its own shape, or none"
    )
