"""Loads a model from its section of a config: random, imported, or from a training run."""

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
from distill_jax.errors import InputError, bad_value
from distill_jax.hub.load import Overrides, check_layers, load_model
from distill_jax.hub.pretrained import Pretrained, open_model
from distill_jax.hub.tokenizer import TokenizerFiles
from distill_jax.models import DecoderConfig, DecoderModel, _rope, trainables
from distill_jax.models.options import ModelOptions, StudentOptions
from distill_jax.models.runs import BEST, RUN, Run, run_folder
from distill_jax.models.trainables import LayerSharing, Trainable
from distill_jax.nn import params, sharding
from distill_jax.nn.layers import ComputeConfig
from distill_jax.nn.quantise import QuantiseOptions
from distill_jax.runtime import best_checkpoint, workdir
from distill_jax.types import FamilyConfig, JsonObject, Model, PyTree, TextConfig

ConfigT = TypeVar("ConfigT", bound=Any)  # a frozen dataclass: a family's Config or one inside it


@dataclasses.dataclass(frozen=True)
class LoadedModel:
  """A model in memory, with the settings of its computation and its checkpoint."""

  model: Model
  config: FamilyConfig
  compute: ComputeConfig
  pretrained: Pretrained | None  # tokenizer, generation config, digest; None for random weights

  @property
  def text_config(self) -> TextConfig:
    """The family's Config, for models of text."""
    return cast(TextConfig, self.config)

  @property
  def decoder_config(self) -> DecoderConfig:
    """The family's Config, for decoders."""
    return cast(DecoderConfig, self.config)

  @property
  def decoder(self) -> DecoderModel:
    """The model, for decoders."""
    return cast(DecoderModel, self.model)


@dataclasses.dataclass(frozen=True, eq=False)
class ModelSource:
  """A model named in a config, and everything known about it before its weights are read.

  `open_source` returns it. Only `digest`, `identity` and the `load` methods read weights.

  Attributes:
    options: the section of the config.
    seed: the config's seed, part of the identity of random weights.
    pretrained: the checkpoint, or the checkpoint from which a run's student started; None for
      random weights.
    run: the run that trained the model; None unless the options name one.
  """

  options: ModelOptions
  seed: int
  pretrained: Pretrained | None = None
  run: Run | None = None

  @property
  def name(self) -> str:
    """A readable name: the source, or the family and shape."""
    return self.options.source or f"{self.options.family} {self.options.shape}"

  @property
  def tokenizer(self) -> TokenizerFiles | None:
    """The tokenizer of the checkpoint; None without one."""
    return self.pretrained.tokenizer if self.pretrained else None

  @property
  def generation(self) -> JsonObject:
    """The contents of generation_config.json; empty without one."""
    return self.pretrained.generation if self.pretrained else {}

  @property
  def family(self) -> str:
    """The family: a module of distill_jax.models."""
    if self.run is not None:
      return self.run.student.family
    return self.pretrained.family if self.pretrained else self.options.family

  @functools.cached_property
  def config(self) -> FamilyConfig:
    """The family's Config, with `changes` and `keep_layers` applied.

    Raises:
      InputError: the family does not have the shape or a field, the source has another shape, or
        it does not have a layer to keep.
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
      section = "student." if isinstance(options, StudentOptions) else ""
      check_layers(self.pretrained, options.keep_layers, f"{section}keep_layers")
    config = apply_changes(config, options.changes)
    return config.keep_layers(options.keep_layers) if options.keep_layers else config

  @property
  def text_config(self) -> TextConfig:
    """The family's Config, for models of text."""
    return cast(TextConfig, self.config)

  @property
  def decoder_config(self) -> DecoderConfig:
    """The family's Config, for decoders."""
    return cast(DecoderConfig, self.config)

  @functools.cached_property
  def compute(self) -> ComputeConfig:
    """The settings of the model's computation."""
    return compute_config(self.options)

  @functools.cached_property
  def abstract(self) -> Model:
    """The shapes of the model that `load` returns."""
    return jax.eval_shape(self._init, jax.random.key(0))

  @functools.cached_property
  def trainable(self) -> Trainable:
    """The selection of the student's trained parameters."""
    assert isinstance(self.options, StudentOptions)
    return trainables.of_student(self.options)

  @functools.cached_property
  def abstract_trainable(self) -> PyTree:
    """The shapes of the trained parameters: the model, its shared layers, or its adapters."""
    init = functools.partial(self.trainable.init, pretrained=bool(self.options.source))
    return jax.eval_shape(init, self.abstract, key=jax.random.key(0))

  @functools.cached_property
  def digest(self) -> str:
    """SHA-256 of the weights, in hex; for random weights, a text with the seed.

    Raises:
      InputError: it differs from `options.digest`.
    """
    if self.run is not None:
      return self.run.digest
    if self.pretrained is None:
      return f"random, seed {self.seed}"
    self.check_digest()
    return self.pretrained.digest

  @property
  def identity(self) -> dict[str, str]:
    """Name and digest, for the manifest of a record store."""
    return {"name": self.name, "digest": self.digest}

  def load(self, mesh: Mesh, key: jax.Array) -> LoadedModel:
    """Returns the model with its parameters in their storage sharding.

    With student.train="shared", layers have their shared values. Adapters are not attached, and
    weights are not rounded to integers.

    Args:
      mesh: the mesh.
      key: PRNG key of parameters that are not in a checkpoint.

    Raises:
      InputError: the weights do not fit the config, or do not have the digest `options.digest`.
    """
    loaded = self.load_initial(mesh, key)
    if isinstance(self.options, StudentOptions) and isinstance(self.trainable, LayerSharing):
      shared = self.start_training(loaded.model, mesh, {"student": key})
      del loaded  # frees memory for the copy
      model = self.trainable.unshare(shared, mesh, self.compute)
      return LoadedModel(model, self.config, self.compute, self.pretrained)
    return loaded

  def start_training(self, model: Model, mesh: Mesh, keys: Mapping[str, jax.Array]) -> PyTree:
    """Returns the trained parameters before step 0: the model, its shared layers, or its adapters.

    Args:
      model: the student, from `load_initial`.
      mesh: the mesh.
      keys: the run's PRNG keys; see runs.keys.
    """
    shardings = sharding.shardings(self.abstract_trainable, mesh, self.compute.rules)
    return self.trainable.start(model, keys, shardings, bool(self.options.source))

  def load_initial(self, mesh: Mesh, key: jax.Array) -> LoadedModel:
    """Returns the model as `load` does, but before layers are shared."""
    spec, compute, config = self.options, self.compute, self.config
    if self.run is not None:
      model = self.run.load(mesh, compute)
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
    """Checks the digest of the checkpoint if `options.digest` is set, which reads the weights.

    Raises:
      InputError: it differs.
    """
    digest, source = self.options.digest, self.pretrained
    if digest and source is not None and source.digest != digest:
      raise InputError(
        f"{self.options.source} has digest {source.digest}, but the config requires {digest}. The "
        "model has changed, or a file is damaged: fetch it again, or change `digest`."
      )


def open_source(options: ModelOptions, seed: int = 0) -> ModelSource:
  """Opens a model without reading its weights.

  Args:
    options: the model's section of a config.
    seed: the seed of that config.

  Raises:
    InputError: the source does not exist or cannot be read, or the options change the model of a
      run.
  """
  if options.source.startswith(RUN):
    for key, default in (("keep_layers", ()), ("changes", {}), ("new", ())):
      if value := getattr(options, key):
        expected = f"{default!r} because the source {options.source} is a run"
        raise bad_value(key, value, expected, "Export the run, and use the folder as the source")
    folder = run_folder(options.source)
    best = options.source.endswith(BEST)
    run = open_run(folder, best_checkpoint.step_to_open(folder, best=True) if best else None)
    return ModelSource(options, seed, run.student.pretrained, run)
  return ModelSource(options, seed, open_model(options.source) if options.source else None)


def open_run(folder: Path, step: int | None = None) -> Run:
  """Opens the run in a local folder.

  Args:
    folder: the folder.
    step: the step of the checkpoint; None for the last one.
  """
  config = workdir.read_config(folder)
  return Run(folder, config, open_source(config.student, config.seed), step)


def compute_config(options: ModelOptions) -> ComputeConfig:
  """Returns the settings of a model's computation."""
  return ComputeConfig(
    dtype=options.dtype,
    rules=sharding.rules(options.rules),
    remat=options.remat,
    attention=options.attention,
    quantise=options.quantise if isinstance(options, StudentOptions) else QuantiseOptions(),
  )


def apply_changes(config: ConfigT, changes: JsonObject, prefix: str = "") -> ConfigT:
  """Returns a family's Config with some fields changed.

  Args:
    config: the Config, or a Config inside it.
    changes: new values by field; for a Config inside the Config, a dict of its fields; for
      another rope scaling, a dict with its rope_type, as in config.json.
    prefix: the path of `config` in the family's Config, e.g. "vision.", for errors.

  Raises:
    InputError: the family does not have a field.
  """
  fields = [f.name for f in dataclasses.fields(config)]
  values: JsonObject = {}
  for key, value in changes.items():
    if key not in fields:
      near = difflib.get_close_matches(key, fields, 1)
      hint = f"Did you mean {prefix + near[0]!r}?" if near else f"Use one of {', '.join(fields)}."
      raise InputError(
        f"changes is {prefix + key!r}; expected fields of this model's config. {hint}"
      )
    values[key] = tuple(value) if isinstance(value, list) else value
    if key == "rope_scaling" and isinstance(value, dict) and "rope_type" in value:
      values[key] = _rope.read(value, config.max_position_embeddings)
    elif dataclasses.is_dataclass(inner := getattr(config, key)):
      if not isinstance(value, dict):
        raise bad_value(f"changes.{prefix}{key}", value, "a dict of its fields", "Use a dict")
      values[key] = apply_changes(inner, value, f"{prefix}{key}.")
  return dataclasses.replace(config, **values)


def _named_config(options: ModelOptions) -> FamilyConfig:
  shapes = registry.load("models", options.family).CONFIGS
  if options.shape not in shapes:
    expected = f"a shape of the {options.family} family: {', '.join(shapes)}"
    raise bad_value("shape", options.shape, expected, "Choose one, or set a source")
  return shapes[options.shape]


def _check_shape(options: ModelOptions, pretrained: Pretrained) -> None:
  """Checks that a source has the shape in the options, which `preflight` uses instead of it.

  Raises:
    InputError: it has another shape.
  """
  no_sizes = {"max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling"}
  named, found = (
    {k: v for k, v in vars(config).items() if k not in no_sizes}
    for config in (_named_config(options), pretrained.config)
  )
  if options.family != pretrained.family or named != found:
    key = next((k for k in found if named.get(k) != found[k]), "family")
    expected, value = named.get(key, options.family), found.get(key, pretrained.family)
    raise InputError(
      f"{options.source} has {key} {value!r}, but the shape {options.family} {options.shape} has "
      f"{expected!r}. Set the shape of the source, or none."
    )
