"""Configs: ml-collections files at the edge, frozen dataclasses inside.

The dataclasses below declare every key, its type and its default once. A file in configs/
starts from `base()`, which holds them all, so that any key can be overridden on the command
line and an unknown one is refused; `resolve` turns the result into a `Config` once.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from distill_jax import registry
from distill_jax.data.options import DataOptions
from distill_jax.efficiency.options import EfficiencyOptions
from distill_jax.errors import InputError
from distill_jax.evals.options import EvaluateOptions
from distill_jax.filters.options import FilterOptions
from distill_jax.generation.options import GenerateOptions
from distill_jax.hub.options import ExportOptions
from distill_jax.models.options import ModelOptions, StudentOptions
from distill_jax.nn.sharding import MeshOptions
from distill_jax.preflight.options import PreflightOptions
from distill_jax.pruning.options import LinkOptions, ShrinkOptions
from distill_jax.records.options import InspectOptions, RecordsOptions
from distill_jax.schedules import Schedule
from distill_jax.training.options import OptimOptions, TrainOptions
from distill_jax.types import JsonObject

# Packages whose modules are entries of the config, and the name of the dataclass in each module.
# In lower case, it is the key of an entry that names the module: {"loss": "kd", "weight": 1.0}.
ENTRY_CLASSES = {
  "losses": "Loss",
  "filters": "Filter",
  "evals": "Benchmark",
  "tasks": "Task",
  "augmentations": "Augmentation",
}


@dataclasses.dataclass(frozen=True)
class Config:
  """A run: what its commands read, compute and write.

  The entries of `losses`, `evals`, `filters`, `tasks` and `augmentations` are of types in those
  packages (losses.TokenLoss, tasks.Task, ...), which this module is below.
  """

  seed: int = 0
  teacher: ModelOptions = ModelOptions()
  teachers: dict[str, str] = dataclasses.field(default_factory=dict)  # name: source of another
  # teacher that runs in the training step, computed as `teacher` is
  student: StudentOptions = StudentOptions()
  mesh: MeshOptions = MeshOptions()
  data: DataOptions = DataOptions()
  records: RecordsOptions = RecordsOptions()
  losses: dict[str, Any] = dataclasses.field(default_factory=dict)  # name: Loss
  optim: OptimOptions = OptimOptions()
  train: TrainOptions = TrainOptions()
  evaluate: EvaluateOptions = EvaluateOptions()
  evals: dict[str, Any] = dataclasses.field(default_factory=dict)  # name: Benchmark
  generate: GenerateOptions = GenerateOptions()
  filter: FilterOptions = FilterOptions()
  filters: dict[str, Any] = dataclasses.field(default_factory=dict)  # name: Filter
  tasks: dict[str, Any] = dataclasses.field(default_factory=dict)  # name: Task; empty: the next
  # token of the corpus in `data`. Each of several tasks has a part of the student's head, in this
  # order, and train.records names a store for each of them, or none
  augmentations: dict[str, Any] = dataclasses.field(default_factory=dict)  # name: Augmentation
  export: ExportOptions = ExportOptions()
  shrink: ShrinkOptions = ShrinkOptions()
  chain: tuple[str, ...] = ()  # names in `links`, from the teacher to the last student
  links: dict[str, LinkOptions] = dataclasses.field(default_factory=dict)  # name: a student
  efficiency: EfficiencyOptions = EfficiencyOptions()
  inspect: InspectOptions = InspectOptions()
  preflight: PreflightOptions = PreflightOptions()
  profile_steps: str = ""  # the flag --profile_steps


def base() -> ConfigDict:
  """Returns every key with its default, for a file in configs/ to start from."""
  return ConfigDict(dataclasses.asdict(Config()))


def loss(name: str, **fields: Any) -> ConfigDict:
  """Returns an entry of `losses`: a module of distill_jax/losses with all its keys.

  A weight or temperature is a number or `schedule(...)`.
  """
  return _entry("losses", name, fields)


def filter(name: str, **fields: Any) -> ConfigDict:
  """Returns an entry of `filters`: a module of distill_jax/filters with all its keys."""
  return _entry("filters", name, fields)


def benchmark(name: str, **fields: Any) -> ConfigDict:
  """Returns an entry of `evals`: a module of distill_jax/evals with all its keys."""
  return _entry("evals", name, fields)


def task(name: str, **fields: Any) -> ConfigDict:
  """Returns an entry of `tasks`: a module of distill_jax/tasks with all its keys."""
  return _entry("tasks", name, fields)


def augmentation(name: str, **fields: Any) -> ConfigDict:
  """Returns an entry of `augmentations`: a module of that package with all its keys."""
  return _entry("augmentations", name, fields)


def link(**fields: Any) -> ConfigDict:
  """Returns an entry of `links` with all its keys: link(steps=64, student={"source": …})."""
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
  """Returns the key of an entry that names its module, e.g. "loss"."""
  return ENTRY_CLASSES[package].lower()


def _default(field: dataclasses.Field) -> Any:
  """Returns the default of a field as a config file would write it."""
  if field.default_factory is not dataclasses.MISSING:
    return field.default_factory()
  return field.default.values[0] if isinstance(field.default, Schedule) else field.default


def schedule(*points: tuple[float, float], shape: str = "linear") -> JsonObject:
  """Returns a weight or temperature that follows the step: see distill_jax/schedules.py."""
  return {"points": points, "shape": shape}


def resolve(config: ConfigDict) -> Config:
  """Returns a config as frozen dataclasses.

  Raises:
    InputError: a key is unknown or has a value of another type; the error has its dotted name.
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
  """Returns a resolved config as plain values, for a run's config.json."""
  tree = dataclasses.asdict(config)
  for package in ENTRY_CLASSES:
    for name, value in getattr(config, package).items():
      tree[package][name][_module_key(package)] = type(value).__module__.rpartition(".")[2]
  return tree


def from_dict(tree: JsonObject) -> Config:
  """Returns the config of a run's config.json; the inverse of `to_dict`."""
  return resolve(ConfigDict(tree, convert_dict=True))


def _build_entry(package: str, fields: JsonObject, path: str) -> Any:
  key = _module_key(package)
  if key not in fields:
    raise InputError(f"{path} has no key {key!r}; name a module of distill_jax/{package} there")
  own = {name: value for name, value in fields.items() if name != key}
  return _build(_entry_class(package, fields[key]), own, path)


def _check_keys(given: Iterable[str], known: Iterable[str], path: str) -> None:
  """Raises InputError if a key is not known. `path` is the dotted name of what holds them."""
  known = list(known)
  for key in given:
    if key not in known:
      near = difflib.get_close_matches(key, known, 1)
      hint = f"did you mean {near[0]!r}?" if near else f"it holds {', '.join(known)}"
      raise InputError(f"config key {_join(path, key)!r} is unknown; {hint}")


def _join(path: str, key: str) -> str:
  return f"{path}.{key}" if path else key


def _build(cls: Any, tree: JsonObject, path: str) -> Any:
  """Returns a dataclass from a dict, each field converted to its declared type."""
  hints = typing.get_type_hints(cls)
  _check_keys(tree, hints, path)
  fields = {key: _convert(hints[key], value, _join(path, key)) for key, value in tree.items()}
  try:
    return cls(**fields)
  except InputError as error:
    if not path or str(error).startswith(f"{path}."):
      raise
    raise InputError(f"{path}: {error}") from error


def _convert(hint: Any, value: Any, path: str) -> Any:
  """Returns a plain value as the type that its field declares.

  Args:
    hint: Any, bool, int, float, str, Schedule, a dataclass, tuple[X, ...] or dict[str, X].
    value: as ml_collections or JSON gives it.
    path: dotted name of the key, for errors.
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
  if type(value) is hint:  # not isinstance: True is no int
    return value
  expected = getattr(hint, "__name__", str(hint))
  raise InputError(
    f"config key {path!r} is {value!r}, a {type(value).__name__}; it wants {expected}"
  )


def _convert_schedule(value: Any, path: str) -> Schedule:
  """Returns a schedule from what `schedule` gives, or from a number, which is constant."""
  if not isinstance(value, dict):
    return Schedule(((0.0, _convert(float, value, path)),))
  points = tuple((float(step), float(y)) for step, y in value["points"])
  return Schedule(points, value["shape"])
