"""The config: ml-collections in the files of configs/, frozen dataclasses in the code.

`Config` and the dataclasses of its sections declare every key once, with its type, default and
meaning. A config file starts from `base()`, which holds all keys, so that any key can be overridden
on the command line and unknown keys raise an error. `resolve` converts the result to a `Config`.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from distill_jax import registry
from distill_jax.config_reference import TYPE_NAMES
from distill_jax.data.options import DataOptions, PackOptions
from distill_jax.efficiency.options import EfficiencyOptions
from distill_jax.errors import InputError, bad_value
from distill_jax.evals.options import EvaluateOptions
from distill_jax.filters.options import FilterOptions
from distill_jax.generation.options import GenerateOptions
from distill_jax.hub.options import ExportOptions
from distill_jax.models.options import ModelOptions, StudentOptions
from distill_jax.nn.sharding import MeshOptions
from distill_jax.on_policy.options import OnPolicyOptions
from distill_jax.preflight.options import PreflightOptions
from distill_jax.pruning.options import LinkOptions, ShrinkOptions
from distill_jax.records.options import InspectOptions, RecordsOptions
from distill_jax.registry import ENTRY_CLASSES
from distill_jax.retarget.options import RetargetOptions
from distill_jax.retokenize.options import RetokenizeOptions
from distill_jax.schedules import Schedule
from distill_jax.training.options import OptimOptions, TrainOptions
from distill_jax.types import JsonObject


@dataclasses.dataclass(frozen=True)
class Config:
  """The config of a run: what its commands read, compute and write.

  The entries of `losses`, `evals`, `filters`, `tasks` and `augmentations` have types from these
  packages (losses.TokenLoss, tasks.Task, ...). They are `Any` here, because this module must not
  import the packages.
  """

  seed: int = 0
  """Seed of all randomness in a run: initial weights, data order, sampling and augmentations."""

  teacher: ModelOptions = ModelOptions()
  """The teacher: the model to distil from."""

  teachers: dict[str, str] = dataclasses.field(default_factory=dict)
  """Additional teachers that run in the training step: {name: source}.

  All other settings of these models are those of `teacher`.
  """

  student: StudentOptions = StudentOptions()
  """The student: the model to train."""

  mesh: MeshOptions = MeshOptions()
  """The device mesh on which models run."""

  data: DataOptions = DataOptions()
  """The text corpus, its tokenizer and the sequence length."""

  pack: PackOptions = PackOptions()
  """Settings of `pack`: how many processes tokenize the corpus."""

  records: RecordsOptions = RecordsOptions()
  """Settings of `record`: which teacher outputs are stored."""

  retarget: RetargetOptions = RetargetOptions()
  """Settings of `retarget`: the records to convert to the student's tokenizer."""

  losses: dict[str, Any] = dataclasses.field(default_factory=dict)
  """Training losses by name, made with config.loss("MODULE", ...)."""

  optim: OptimOptions = OptimOptions()
  """The optimizer and the learning-rate schedule."""

  train: TrainOptions = TrainOptions()
  """Settings of `train`: the length of the run, its records and checkpoints."""

  on_policy: OnPolicyOptions = OnPolicyOptions()
  """Settings of `on_policy`: rounds of sampled texts, on which `train` is run."""

  evaluate: EvaluateOptions = EvaluateOptions()
  """Settings of `evaluate`: the models to evaluate and how benchmarks are sampled."""

  evals: dict[str, Any] = dataclasses.field(default_factory=dict)
  """Benchmarks by name, made with config.benchmark("MODULE", ...)."""

  generate: GenerateOptions = GenerateOptions()
  """Settings of `generate`: prompts, sampling, decoding, and the server of a served teacher."""

  filter: FilterOptions = FilterOptions()
  """Settings of `filter`: the samples to read and the order of `filters`."""

  filters: dict[str, Any] = dataclasses.field(default_factory=dict)
  """Filters for generated samples by name, made with config.filter("MODULE", ...)."""

  tasks: dict[str, Any] = dataclasses.field(default_factory=dict)
  """Tasks by name, made with config.task("MODULE", ...); {}: next-token prediction on `data`.

  Several tasks share the student. Each has its own part of the student's head, in this order, and
  train.records has one store for each task, or is empty.
  """

  augmentations: dict[str, Any] = dataclasses.field(default_factory=dict)
  """Augmentations of a task's inputs by name, made with config.augmentation("MODULE", ...)."""

  export: ExportOptions = ExportOptions()
  """Settings of `export`: the Hugging Face folder to write."""

  shrink: ShrinkOptions = ShrinkOptions()
  """Settings of `shrink`: the sizes or the target of the smaller model."""

  retokenize: RetokenizeOptions = RetokenizeOptions()
  """Settings of `retokenize`: the tokenizer whose tokens the student gets rows for."""

  chain: tuple[str, ...] = ()
  """Names in `links` in the order in which `chain` trains them; the last is the final student."""

  links: dict[str, LinkOptions] = dataclasses.field(default_factory=dict)
  """Students of a chain by name, made with config.link(...)."""

  efficiency: EfficiencyOptions = EfficiencyOptions()
  """Settings of `efficiency`: the operating points at which teacher and student are compared."""

  inspect: InspectOptions = InspectOptions()
  """Settings of `inspect`."""

  preflight: PreflightOptions = PreflightOptions()
  """Settings of `preflight`."""

  profile_steps: str = ""
  """Training steps to profile as "FIRST:END", e.g. "10:13" for steps 10 to 12; "": none.

  The flag --profile_steps sets this key.
  """


def base() -> ConfigDict:
  """Returns a config with the default value of every key; config files start from it."""
  return ConfigDict(dataclasses.asdict(Config()))


def loss(name: str, **fields: Any) -> ConfigDict:
  """Returns an entry of `losses`.

  Args:
    name: a module of distill_jax/losses.
    **fields: keys of its Loss. A weight or a temperature is a number or `schedule(...)`.
  """
  return _entry("losses", name, fields)


def filter(name: str, **fields: Any) -> ConfigDict:
  """Returns an entry of `filters`.

  Args:
    name: a module of distill_jax/filters.
    **fields: keys of its Filter.
  """
  return _entry("filters", name, fields)


def benchmark(name: str, **fields: Any) -> ConfigDict:
  """Returns an entry of `evals`.

  Args:
    name: a module of distill_jax/evals.
    **fields: keys of its Benchmark.
  """
  return _entry("evals", name, fields)


def task(name: str, **fields: Any) -> ConfigDict:
  """Returns an entry of `tasks`.

  Args:
    name: a module of distill_jax/tasks.
    **fields: keys of its Task.
  """
  return _entry("tasks", name, fields)


def augmentation(name: str, **fields: Any) -> ConfigDict:
  """Returns an entry of `augmentations`.

  Args:
    name: a module of distill_jax/augmentations.
    **fields: keys of its Augmentation.
  """
  return _entry("augmentations", name, fields)


def link(**fields: Any) -> ConfigDict:
  """Returns an entry of `links`, e.g. link(steps=64, student={"source": "assistant"})."""
  entry = ConfigDict(dataclasses.asdict(LinkOptions()))
  _check_keys(fields, entry, "links")
  entry.update(fields)
  return entry


def _entry(package: str, name: str, fields: JsonObject) -> ConfigDict:
  keys = {f.name: _default(f) for f in dataclasses.fields(_entry_class(package, name))}
  _check_keys(fields, keys, f"{package}.{name}")
  return ConfigDict({_module_key(package): name, **keys, **fields}, type_safe=False)


def _entry_class(package: str, name: str) -> Any:
  return getattr(registry.load(package, name), ENTRY_CLASSES[package])


def _module_key(package: str) -> str:
  """Returns the key that names the module of an entry, e.g. "loss"."""
  return ENTRY_CLASSES[package].lower()


def _default(field: dataclasses.Field) -> Any:
  """Returns the default of a field in the form in which a config file has it."""
  if field.default_factory is not dataclasses.MISSING:
    return field.default_factory()
  return field.default.values[0] if isinstance(field.default, Schedule) else field.default


def schedule(*points: tuple[float, float], shape: str = "linear") -> JsonObject:
  """Returns a weight or temperature that depends on the training step.

  Args:
    *points: (step, value), in the order of the steps.
    shape: how values between points are computed; see distill_jax/schedules.py.
  """
  return {"points": points, "shape": shape}


def resolve(config: ConfigDict) -> Config:
  """Returns a config as frozen dataclasses.

  Raises:
    InputError: A key is unknown or its value has the wrong type. The message has the dotted key.
  """
  tree = config.to_dict()
  entries = {
    package: {
      name: _build_entry(package, fields, f"{package}.{name}")
      for name, fields in tree.pop(package, {}).items()
    }
    for package in ENTRY_CLASSES
  }
  return dataclasses.replace(_build(Config, tree, ""), **entries)


def to_dict(config: Config) -> JsonObject:
  """Returns a resolved config as plain values: the content of a run's config.json."""
  tree = dataclasses.asdict(config)
  for package in ENTRY_CLASSES:
    for name, value in getattr(config, package).items():
      tree[package][name][_module_key(package)] = type(value).__module__.rpartition(".")[2]
  return tree


def from_dict(tree: JsonObject) -> Config:
  """Returns the config for the content of a config.json; the inverse of `to_dict`."""
  return resolve(ConfigDict(tree, convert_dict=True))


def _build_entry(package: str, fields: JsonObject, path: str) -> Any:
  key = _module_key(package)
  if key not in fields:
    raise InputError(
      f"{path}.{key} is missing; expected the name of a module in distill_jax/{package}. Make the "
      f"entry with config.{key}(NAME)."
    )
  own = {name: value for name, value in fields.items() if name != key}
  return _build(_entry_class(package, fields[key]), own, path)


def _check_keys(given: Iterable[str], known: Iterable[str], path: str) -> None:
  """Raises InputError if a key is unknown. `path` is the dotted key of the section."""
  known = list(known)
  for key in given:
    if key not in known:
      near = difflib.get_close_matches(key, known, 1)
      where = f"the keys of {path}" if path else "the sections"
      hint = f"did you mean {near[0]!r}?" if near else f"{where} are {', '.join(known)}."
      if "parameters" in known and not near:
        hint += f" A parameter of the divergence is set by parameters={{{key!r}: VALUE}}."
      raise InputError(f"Config key {_join(path, key)!r} is unknown; {hint}")


def _join(path: str, key: str) -> str:
  return f"{path}.{key}" if path else key


def _build(cls: Any, tree: JsonObject, path: str) -> Any:
  """Returns an instance of a dataclass; each value is converted to the type of its field."""
  hints = typing.get_type_hints(cls)
  _check_keys(tree, hints, path)
  fields = {key: _convert(hints[key], value, _join(path, key)) for key, value in tree.items()}
  try:
    return cls(**fields)
  except InputError as error:
    if not path or str(error).startswith(f"{path}."):
      raise
    starts_with_field = str(error).partition(" is ")[0] in hints
    raise InputError(f"{path}{'.' if starts_with_field else ': '}{error}") from error


def _convert(hint: Any, value: Any, path: str) -> Any:
  """Converts a plain value to the declared type of its field.

  Args:
    hint: Any, bool, int, float, str, Schedule, a dataclass, tuple[X, ...] or dict[str, X].
    value: a value from ml_collections or JSON.
    path: the dotted key, for errors.
  """
  container, args = typing.get_origin(hint), typing.get_args(hint)
  if hint is Any:
    return value
  if hint is Schedule:
    return _convert_schedule(value, path)
  if dataclasses.is_dataclass(hint) and isinstance(value, dict):
    return _build(hint, value, path)
  if container is tuple and isinstance(value, list | tuple):
    return tuple(_convert(args[0], item, path) for item in value)
  if container is dict and isinstance(value, dict):
    return {key: _convert(args[1], item, _join(path, key)) for key, item in value.items()}
  if hint is float and type(value) is int:
    return float(value)
  if type(value) is hint:  # isinstance would accept True as an int
    return value
  found = type(value).__name__
  expected = TYPE_NAMES.get((container or hint).__name__, "a section with keys")
  raise bad_value(path, value, f"{expected}, not a value of type {found}", "Correct the value")


def _convert_schedule(value: Any, path: str) -> Schedule:
  """Returns a Schedule; `value` is a number (a constant) or a result of `schedule`."""
  if not isinstance(value, dict):
    return Schedule(((0.0, _convert(float, value, path)),))
  points = tuple((float(step), float(y)) for step, y in value["points"])
  return Schedule(points, value["shape"])
