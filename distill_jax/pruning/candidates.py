"""Proposals of student sizes near a target: fewer layers, narrower layers, or both."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator

from distill_jax.errors import InputError, bad_value
from distill_jax.models import DecoderConfig
from distill_jax.pruning import choose, shapes
from distill_jax.pruning.options import ShrinkOptions
from distill_jax.types import JsonObject

TOLERANCE = 0.1  # maximum relative difference between a proposed size and the target

Size = Callable[[DecoderConfig], float]  # the size of a model, in the target's unit
Check = Callable[[DecoderConfig], object]  # raises InputError for a Config that cannot be used


@dataclasses.dataclass(frozen=True)
class Target:
  """The size that a student should have.

  Attributes:
    size: computes the size of a model from its Config.
    value: the target, in the same unit.
    unit: the unit, for errors.
    key: the key of `shrink` that sets the target.
    given: the value of that key.
  """

  size: Size
  value: float
  unit: str
  key: str
  given: float

  def distance(self, config: DecoderConfig) -> float:
    """Returns |log(size / value)| for a Config."""
    return abs(math.log(self.size(config) / self.value))

  def is_met(self, config: DecoderConfig) -> bool:
    """Returns whether a Config's size is within TOLERANCE of the target."""
    return abs(self.size(config) / self.value - 1) <= TOLERANCE


@dataclasses.dataclass(frozen=True)
class _Teacher:
  """The model from which candidates are cut."""

  family: str
  config: DecoderConfig

  def student(self, options: ShrinkOptions) -> DecoderConfig:
    """Returns the Config of a candidate. Its size does not depend on which layers are kept."""
    narrowed = shapes.narrowed(options, self.family, self.config)
    return narrowed.keep_layers(choose.even(options.layers, self.config.num_hidden_layers))

  def nearest(self, candidates: Iterable[ShrinkOptions], target: Target) -> ShrinkOptions:
    """Returns the candidate nearest to the target."""
    return min(candidates, key=lambda options: target.distance(self.student(options)))


def propose(
  options: ShrinkOptions,
  family: str,
  config: DecoderConfig,
  target: Target,
  check: Check = lambda config: None,
) -> dict[str, ShrinkOptions]:
  """Proposes candidates, by name, each as near to the target as its kind allows.

  `depth` has fewer layers. `inner` has narrower feed-forwards and fewer heads or experts; `width`
  also has fewer embedding channels. `depth-inner` and `depth-width` combine both kinds equally.

  Args:
    options: the options that all candidates share; this function sets their sizes.
    family: the teacher's family.
    config: the teacher's Config.
    target: the target.
    check: raises InputError for a Config that cannot be used, e.g. because of the mesh.

  Raises:
    InputError: the target is not smaller than the teacher, or no candidate is near the target.
  """
  key = f"shrink.{target.key}"
  if target.value >= (size := target.size(config)):
    expected = f"a target below the teacher's {size:,.0f} {target.unit}"
    raise bad_value(key, target.given, expected, "Choose a smaller student")
  teacher, L = _Teacher(family, config), config.num_hidden_layers
  depth = teacher.nearest((_with_layers(options, n) for n in range(1, L + 1)), target)
  half_depth = max(1, round(math.sqrt(depth.layers * L)))
  candidates_by_kind, smallest = {"depth": depth}, [options]
  for name, narrow_hidden in (("inner", False), ("width", True)):
    ladder = list(_ladder(options, family, config, narrow_hidden, check)) or [options]
    smallest = [options, *ladder]
    for kind, layers in ((name, L), (f"depth-{name}", half_depth)):
      rung = teacher.nearest((_with_layers(rung, layers) for rung in ladder), target)
      candidates_by_kind[kind] = teacher.nearest(_around(rung, config), target)
  proposed: dict[str, ShrinkOptions] = {}
  for name, candidate in candidates_by_kind.items():
    if target.is_met(teacher.student(candidate)) and candidate not in proposed.values():
      proposed[name] = candidate
  if not proposed:
    nearest = teacher.nearest(candidates_by_kind.values(), target)
    min_size = min(target.size(teacher.student(_with_layers(rung, 1))) for rung in smallest)
    expected = (
      f"a target within {TOLERANCE:.0%} of a possible student: it needs {target.value:,.0f} "
      f"{target.unit}, the nearest one has {target.size(teacher.student(nearest)):,.0f} and the "
      f"smallest one {min_size:,.0f}"
    )
    raise bad_value(key, target.given, expected, "Change the target")
  return proposed


def _with_layers(options: ShrinkOptions, layers: int) -> ShrinkOptions:
  return dataclasses.replace(options, layers=layers)


def _ladder(
  options: ShrinkOptions, family: str, config: DecoderConfig, narrow_hidden: bool, check: Check
) -> Iterator[ShrinkOptions]:
  """Yields candidates of rising width below the teacher's, in multiples that suit hardware."""
  count = functools.partial(shapes.count, config)
  axes = shapes.axis_names(family, config)
  keys = [k for k, size in shapes.SIZES.items() if size.axis in axes and count(k)]
  widths = [k for k in ("intermediate", "hidden") if k in keys and (narrow_hidden or k != "hidden")]
  steps = count("hidden") // unit(count("hidden"))
  for i in range(1, steps):
    fraction = i / steps
    sizes: JsonObject = {
      k: _multiple(fraction * count(k), unit(count(k))) for k in widths
    } | _fewer_heads(config, fraction, "kv_heads" in keys)
    if "experts" in keys:
      E = count("experts")
      sizes["experts"] = _multiple(fraction * E, math.lcm(config.expert_groups, unit(E)))
    candidate = dataclasses.replace(options, **sizes)
    try:
      check(shapes.narrowed(candidate, family, config))
    except InputError:  # not possible for the family, e.g. too few experts for its router
      continue
    yield candidate


def _around(options: ShrinkOptions, config: DecoderConfig) -> list[ShrinkOptions]:
  """Returns a candidate, and variants with a slightly wider or narrower feed-forward."""
  if not options.intermediate:
    return [options]
  full = config.intermediate_size
  sizes = [options.intermediate + i * unit(full) for i in range(-4, 5)]
  return [dataclasses.replace(options, intermediate=n) for n in sizes if 0 < n <= full]


def unit(n: int) -> int:
  """Returns the step of a width n: the largest power of two up to n / 16, at most 128."""
  return min(128, 2 ** int(math.log2(max(1, n // 16))))


def _multiple(x: float, unit: int) -> int:
  return max(1, round(x / unit)) * unit


def _fewer_heads(config: DecoderConfig, fraction: float, grouped: bool) -> dict[str, int]:
  """Returns the numbers of heads: whole groups of query heads with their key/value head.

  With a single group, only its query heads are reduced. A power of two of groups is reduced to a
  power of two, so that devices can still share them evenly.
  """
  H, G = config.num_attention_heads, config.num_key_value_heads
  if not grouped or G == 1:
    return {"heads": _multiple(fraction * H, unit(H))}
  groups = max(1, round(fraction * G))
  if G & (G - 1) == 0:
    groups = 2 ** round(math.log2(groups))
  return {"heads": H // G * groups, "kv_heads": groups}
