"""Shapes near a target: fewer layers, narrower layers, and both."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator

from distill_jax.errors import InputError
from distill_jax.models import DecoderConfig
from distill_jax.pruning import choose, shapes
from distill_jax.pruning.options import ShrinkOptions
from distill_jax.types import JsonObject

TOLERANCE = 0.1  # how far from the target, as a fraction of it, a proposed shape may be

Size = Callable[[DecoderConfig], float]  # of a family's Config, in the target's units
Check = Callable[[DecoderConfig], object]  # raises InputError for a Config that is of no use


@dataclasses.dataclass(frozen=True)
class Target:
  """The size that a student should have.

  Attributes:
    size: measures a family's Config.
    value: the size, in the same units.
    key: of `shrink`, which asks for it; with more words where the unit is another.
  """

  size: Size
  value: float
  key: str

  def distance(self, config: DecoderConfig) -> float:
    """How many times too large or too small a Config is, as the size of the logarithm."""
    return abs(math.log(self.size(config) / self.value))

  def is_met(self, config: DecoderConfig) -> bool:
    return abs(self.size(config) / self.value - 1) <= TOLERANCE


@dataclasses.dataclass(frozen=True)
class _Teacher:
  """What candidates are cut from."""

  family: str
  config: DecoderConfig

  def student(self, options: ShrinkOptions) -> DecoderConfig:
    """The Config of a candidate; which layers it keeps does not matter here."""
    narrowed = shapes.narrowed(options, self.family, self.config)
    return narrowed.keep_layers(choose.even(options.layers, self.config.num_hidden_layers))

  def nearest(self, candidates: Iterable[ShrinkOptions], target: Target) -> ShrinkOptions:
    """The candidate that comes nearest to the target."""
    return min(candidates, key=lambda options: target.distance(self.student(options)))


def propose(
  options: ShrinkOptions,
  family: str,
  config: DecoderConfig,
  target: Target,
  check: Check = lambda config: None,
) -> dict[str, ShrinkOptions]:
  """Proposes shapes by name, each as near to the target as its kind gets.

  `depth` has fewer layers, `inner` narrower feed-forwards and fewer heads or experts, `width`
  fewer embedding channels as well; `depth-inner` and `depth-width` go half of the way by each.

  Args:
    options: what all shapes have in common; their sizes are set here.
    family, config: the teacher's.
    check: raises InputError for a Config that is of no use, e.g. where the mesh does not fit.

  Raises:
    InputError: the teacher is no larger, or no kind of shape comes near.
  """
  if target.value >= target.size(config):
    raise InputError(
      f"shrink.{target.key} wants {target.value:,.0f} and the teacher has "
      f"{target.size(config):,.0f}; name less"
    )
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
    raise InputError(
      f"shrink.{target.key} wants {target.value:,.0f} and no shape of this teacher comes within "
      f"{TOLERANCE:.0%}: the nearest has {target.size(teacher.student(nearest)):,.0f} and the "
      f"smallest possible {min_size:,.0f}"
    )
  return proposed


def _with_layers(options: ShrinkOptions, layers: int) -> ShrinkOptions:
  return dataclasses.replace(options, layers=layers)


def _ladder(
  options: ShrinkOptions, family: str, config: DecoderConfig, narrow_hidden: bool, check: Check
) -> Iterator[ShrinkOptions]:
  """Yields ever wider shapes below the teacher's own, at multiples that matrix units like."""
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
    except InputError:  # the family cannot have this one: too few experts for its router, say
      continue
    yield candidate


def _around(options: ShrinkOptions, config: DecoderConfig) -> list[ShrinkOptions]:
  """A shape, and those whose feed-forward is a little wider or narrower."""
  if not options.intermediate:
    return [options]
  full = config.intermediate_size
  sizes = [options.intermediate + i * unit(full) for i in range(-4, 5)]
  return [dataclasses.replace(options, intermediate=n) for n in sizes if 0 < n <= full]


def unit(n: int) -> int:
  """What a width is a multiple of: a power of two, at most 128, that goes into it 16 times."""
  return min(128, 2 ** int(math.log2(max(1, n // 16))))


def _multiple(x: float, unit: int) -> int:
  return max(1, round(x / unit)) * unit


def _fewer_heads(config: DecoderConfig, fraction: float, grouped: bool) -> dict[str, int]:
  """Whole groups of query heads and their keys; heads of the one group where there is one.

  Groups that devices can share evenly stay such: of a power of two, a power of two is left.
  """
  H, G = config.num_attention_heads, config.num_key_value_heads
  if not grouped or G == 1:
    return {"heads": _multiple(fraction * H, unit(H))}
  groups = max(1, round(fraction * G))
  if G & (G - 1) == 0:
    groups = 2 ** round(math.log2(groups))
  return {"heads": H // G * groups, "kv_heads": groups}
