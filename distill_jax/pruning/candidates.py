"""Shapes near a target: fewer layers, narrower layers, and both."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from distill_jax.errors import InputError
from distill_jax.pruning import choose, shapes
from distill_jax.pruning.options import ShrinkOptions

NEAR = 0.1  # of the target that a shape may be away from it

Size = Callable[[Any], float]  # of a family's Config, in the target's units


def propose(
  s: ShrinkOptions,
  family: str,
  config: Any,
  size: Size,
  wanted: float,
  what: str,
  check: Callable[[Any], Any] = lambda config: None,
) -> dict[str, ShrinkOptions]:
  """Shapes by name, each as near to the target as its kind gets.

  `depth` has fewer layers, `inner` narrower feed-forwards and fewer heads or experts, `width`
  fewer embedding channels as well; `depth-inner` and `depth-width` go half of the way by each.

  Args:
    size: of a Config; `wanted` is what it should be, and `what` the key that says so.
    check: raises InputError for a Config that is no use here, as where the mesh does not fit.

  Raises:
    InputError: the teacher is no larger, or no kind of shape comes near.
  """
  L = config.num_hidden_layers
  if wanted >= size(config):
    raise InputError(
      f"shrink.{what} wants {wanted:,.0f} and the teacher has {size(config):,.0f}; name less"
    )
  of = lambda c: size(shapes.narrowed(c, family, config).keep_layers(choose.even(c.layers, L)))
  nearest = lambda shapes: min(shapes, key=lambda c: abs(math.log(of(c) / wanted)))
  layers = lambda n, shapes: [dataclasses.replace(c, layers=n) for c in shapes]
  depth = nearest([dataclasses.replace(s, layers=n) for n in range(1, L + 1)])
  found, half = {"depth": depth}, max(1, round(math.sqrt(depth.layers * L)))
  for name, hidden in (("inner", False), ("width", True)):
    ladder = list(_ladder(s, family, config, hidden, check)) or [s]
    for kind, n in ((name, L), (f"depth-{name}", half)):
      found[kind] = nearest(_around(nearest(layers(n, ladder)), config))
  proposed: dict[str, ShrinkOptions] = {}
  for name, c in found.items():
    if abs(of(c) / wanted - 1) <= NEAR and c not in proposed.values():
      proposed[name] = c
  if not proposed:
    least = min(of(c) for c in layers(1, [s, *ladder]))
    raise InputError(
      f"shrink.{what} wants {wanted:,.0f} and no shape of this teacher comes within {NEAR:.0%}: "
      f"the nearest has {of(nearest(found.values())):,.0f} and the smallest possible {least:,.0f}"
    )
  return proposed


def _ladder(
  s: ShrinkOptions, family: str, config: Any, hidden: bool, check: Callable[[Any], Any]
) -> Iterator[ShrinkOptions]:
  """Ever wider shapes below the teacher's own, at multiples that matrix units like."""
  here = shapes.axes(family, config)
  count = lambda key: getattr(config, shapes.field(config, key))
  keys = [k for k, (_, axis) in shapes.SIZES.items() if axis in here and shapes.field(config, k)]
  wide = [k for k in ("intermediate", "hidden") if k in keys and (hidden or k != "hidden")]
  steps = count("hidden") // unit(count("hidden"))
  for i in range(1, steps):
    share = i / steps
    sizes: dict[str, Any] = {k: _multiple(share * count(k), unit(count(k))) for k in wide}
    sizes |= _fewer_heads(config, share, "kv_heads" in keys)
    if "experts" in keys:
      of = math.lcm(getattr(config, "n_group", 1), unit(count("experts")))
      sizes["experts"] = _multiple(share * count("experts"), of)
    shape = dataclasses.replace(s, **sizes)
    try:
      check(shapes.narrowed(shape, family, config))
    except InputError:  # the family cannot have this one: too few experts for its router, say
      continue
    yield shape


def _around(s: ShrinkOptions, config: Any) -> list[ShrinkOptions]:
  """A shape, and those whose feed-forward is a little wider or narrower."""
  if not s.intermediate:
    return [s]
  most = config.intermediate_size
  sizes = [s.intermediate + i * unit(most) for i in range(-4, 5)]
  return [dataclasses.replace(s, intermediate=n) for n in sizes if 0 < n <= most]


def unit(n: int) -> int:
  """What a width is a multiple of: a power of two, at most 128, that goes into it 16 times."""
  return min(128, 2 ** int(math.log2(max(1, n // 16))))


def _multiple(x: float, of: int) -> int:
  return max(1, round(x / of)) * of


def _fewer_heads(config: Any, share: float, grouped: bool) -> dict[str, int]:
  """Whole groups of query heads and their keys; heads of the one group where there is one.

  Groups that devices can share evenly stay such: of a power of two, a power of two is left.
  """
  H, G = config.num_attention_heads, config.num_key_value_heads
  if not grouped or G == 1:
    return {"heads": _multiple(share * H, unit(H))}
  groups = max(1, round(share * G))
  if G & (G - 1) == 0:
    groups = 2 ** round(math.log2(groups))
  return {"heads": H // G * groups, "kv_heads": groups}
