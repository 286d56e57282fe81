"""Configs: ml-collections files at the edge, frozen dataclasses inside.

The dataclasses below declare every key, its type and its default once. A file in configs/
starts from `base()`, which holds them all, so that any key can be overridden on the command
line and an unknown one is refused; `resolve` turns the result into a `Config` once.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
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

# Packages whose modules are entries of a config, and the dataclass in each of them.
FOLDERS = {
  "losses": "Loss",
  "filters": "Filter",
  "evals": "Benchmark",
  "tasks": "Task",
  "augmentations": "Augmentation",
}


@dataclasses.dataclass(frozen=True)
class Config:
  """The whole story of a run."""

  seed: int = 0
  teacher: ModelOptions = ModelOptions()
  teachers: dict[str, str] = dataclasses.field(default_factory=dict)  # name: source of one more
  # teacher that runs in the step, computed as `teacher` is
  student: StudentOptions = StudentOptions()
  mesh: MeshOptions = MeshOptions()
  data: DataOptions = DataOptions()
  records: RecordsOptions = RecordsOptions()
  losses: dict[str, Any] = dataclasses.field(default_factory=dict)  # name: Loss
  optim: OptimOptions = OptimOptions()
  train: TrainOptions = TrainOptions()
  evaluate: EvaluateOptions = EvaluateOptions()
  evals: dict[str, Any] = dataclasses.field(default_factory=dict)  # name: Set
  generate: GenerateOptions = GenerateOptions()
  filter: FilterOptions = FilterOptions()
  filters: dict[str, Any] = dataclasses.field(default_factory=dict)  # name: Filter
  tasks: dict[str, Any] = dataclasses.field(default_factory=dict)  # name: Task; none: the next
  # token of the corpus in `data`. Of several, each has a part of the student's head, in order,
  # and train.records names a store for each, or none
  augmentations: dict[str, Any] = dataclasses.field(default_factory=dict)  # name: Augmentation
  export: ExportOptions = ExportOptions()
  shrink: ShrinkOptions = ShrinkOptions()
  chain: tuple[str, ...] = ()  # names in `links`, from the teacher to the last student
  links: dict[str, LinkOptions] = dataclasses.field(default_factory=dict)
  efficiency: EfficiencyOptions = EfficiencyOptions()
  inspect: InspectOptions = InspectOptions()
  preflight: PreflightOptions = PreflightOptions()
  profile_steps: str = ""  # the flag --profile_steps


def base() -> ConfigDict:
  """Every key with its default, for a file in configs/ to start from."""
  return ConfigDict(dataclasses.asdict(Config()))


def loss(name: str, **fields: Any) -> ConfigDict:
  """One entry of `losses`: a module of distill_jax/losses with all its keys.

  A weight or temperature is a number or `schedule(...)`.
  """
  return _entry("losses", name, fields)


def filter(name: str, **fields: Any) -> ConfigDict:
  """One entry of `filters`: a module of distill_jax/filters with all its keys."""
  return _entry("filters", name, fields)


def benchmark(name: str, **fields: Any) -> ConfigDict:
  """One entry of `evals`: a set of distill_jax/evals with all its keys."""
  return _entry("evals", name, fields)


def task(name: str, **fields: Any) -> ConfigDict:
  """One entry of `tasks`: a module of distill_jax/tasks with all its keys."""
  return _entry("tasks", name, fields)


def augmentation(name: str, **fields: Any) -> ConfigDict:
  """One entry of `augmentations`: a module of distill_jax/augmentations with all its keys."""
  return _entry("augmentations", name, fields)


def link(**fields: Any) -> ConfigDict:
  """One entry of `links`, with all its keys: link(steps=64, student={"source": …})."""
  entry = ConfigDict(dataclasses.asdict(LinkOptions()))
  _known(fields, entry, "links")
  entry.update(fields)
  return entry


def _entry(package: str, name: str, fields: dict[str, Any]) -> ConfigDict:
  keys = {
    f.name: _default(f)
    for f in dataclasses.fields(getattr(registry.load(package, name), FOLDERS[package]))
  }
  _known(fields, keys, f"{package}.{name}")
  return ConfigDict({_key(package): name, **keys, **fields}, type_safe=False)


def _default(field: dataclasses.Field) -> Any:
  """The default of a field as a config file would write it."""
  if field.default_factory is not dataclasses.MISSING:
    return field.default_factory()
  return field.default.values[0] if isinstance(field.default, Schedule) else field.default


def _key(package: str) -> str:
  """What names an entry's module, as "loss"."""
  return FOLDERS[package].lower()


def schedule(*points: tuple[float, float], shape: str = "linear") -> dict[str, Any]:
  """A weight or temperature that follows the step: see distill_jax/schedules.py."""
  return {"points": points, "shape": shape}


def resolve(config: ConfigDict) -> Config:
  """A config as frozen dataclasses; what does not fit is refused by its dotted name."""
  tree = config.to_dict()
  entries = {
    package: {name: _made(package, fields, name) for name, fields in tree.pop(package, {}).items()}
    for package in FOLDERS
  }
  return dataclasses.replace(_build(Config, tree, ""), **entries)


def to_dict(config: Config) -> dict[str, Any]:
  """The resolved config as plain values, for a run's config.json."""
  tree = dataclasses.asdict(config)
  for package in FOLDERS:
    for name, value in getattr(config, package).items():
      tree[package][name][_key(package)] = type(value).__module__.rpartition(".")[2]
  return tree


def from_dict(tree: dict[str, Any]) -> Config:
  """The inverse of `to_dict`, from a run's config.json."""
  return resolve(ConfigDict(tree, convert_dict=True))


def _made(package: str, fields: dict[str, Any], name: str) -> Any:
  at, key = f"{package}.{name}", _key(package)
  if key not in fields:
    raise InputError(f"{at} has no key {key!r}; name a module of distill_jax/{package} there")
  cls = getattr(registry.load(package, fields[key]), FOLDERS[package])
  return _build(cls, {k: v for k, v in fields.items() if k != key}, at)


def _known(given: Any, known: Any, at: str) -> None:
  for key in given:
    if key not in known:
      near = difflib.get_close_matches(key, known, 1)
      hint = f"did you mean {near[0]!r}?" if near else f"it holds {', '.join(known)}"
      raise InputError(f"config key {(at + '.' if at else '') + key!r} is unknown; {hint}")


def _build(cls: Any, tree: dict[str, Any], at: str) -> Any:
  """A dataclass from a dict, checked field by field."""
  hints = typing.get_type_hints(cls)
  _known(tree, hints, at)
  path = lambda key: f"{at}.{key}" if at else key
  return cls(**{key: _value(hints[key], value, path(key)) for key, value in tree.items()})


def _value(hint: Any, value: Any, at: str) -> Any:
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if hint is Any:
    return value
  if hint is Schedule:
    if isinstance(value, dict):
      points = tuple((float(s), float(v)) for s, v in value["points"])
      return Schedule(points, value["shape"])
    return Schedule(((0.0, float(_value(float, value, at))),))
  if dataclasses.is_dataclass(hint) and isinstance(value, dict):
    return _build(hint, value, at)
  if origin is tuple and isinstance(value, list | tuple):
    return tuple(_value(args[0], v, at) for v in value)
  if origin is dict and isinstance(value, dict):
    return {k: _value(args[1], v, f"{at}.{k}") for k, v in value.items()}
  if origin is types.UnionType and value is None and type(None) in args:
    return None
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if isinstance(hint, type) and type(value) is hint:
    return value
  want = getattr(hint, "__name__", str(hint))
  raise InputError(f"config key {at!r} is {value!r}, a {type(value).__name__}; it wants {want}")
