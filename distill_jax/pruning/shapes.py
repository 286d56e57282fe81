"""The shape of a narrower model, and what a shape costs, with no weight read or made."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax

from distill_jax import registry
from distill_jax.errors import InputError
from distill_jax.nn import params
from distill_jax.pruning.options import ShrinkOptions

# A key of config.Shrink: what a family's Config calls that number, and the axis it shortens.
SIZES = {
  "hidden": (("hidden_size",), "table"),
  "intermediate": (("intermediate_size",), "mlp"),
  "heads": (("num_attention_heads",), "heads"),
  "kv_heads": (("num_key_value_heads",), "kv_heads"),
  "experts": (("num_experts", "n_routed_experts"), "experts"),
  "expert_intermediate": (("moe_intermediate_size",), "expert_mlp"),
}
WAYS = {
  "layers_by": ("even", "ends", "influence", "loss"),
  "kv_heads_by": ("drop", "merge"),
  "experts_by": ("drop", "merge"),
}


@functools.lru_cache(maxsize=256)
def abstract(family: str, config: Any) -> Any:
  """A family's model as shapes."""
  make = registry.load("models", family).Model
  return jax.eval_shape(lambda key: make(config, key), jax.random.key(0))


def family_of(config: Any) -> str:
  """The module of distill_jax/models whose Config it is."""
  return type(config).__module__.rpartition(".")[2]


def axes(family: str, config: Any) -> set[str]:
  """The names of all axes that a model's parameters have."""
  return {a for _, v in params.named_params(abstract(family, config)) for a in _names(v)}


def _names(v: Any) -> tuple[str, ...]:
  return v.get_metadata()["axes"]


def field(config: Any, key: str) -> str:
  """What a Config calls the number that a key of Shrink sets; "" where it has none."""
  has = {f.name for f in dataclasses.fields(config)}
  return next((n for n in SIZES[key][0] if n in has and getattr(config, n) is not None), "")


def check(s: ShrinkOptions, family: str, config: Any) -> None:
  """Refuses what no family, or not this one, can have."""
  for key, ways in WAYS.items():
    if (way := getattr(s, key)) not in ways:
      raise InputError(f"shrink.{key} is {way!r}; it can be one of {', '.join(ways)}")
  if s.window < 0:
    raise InputError(f"shrink.window is {s.window}; it is at least 1, or 0 for as the teacher sees")
  for key in ("layers", *SIZES):
    if getattr(s, key) < 0:
      raise InputError(f"shrink.{key} is {getattr(s, key)}; it is at least 1, or 0 for all")
  if s.sequences < 1 or s.steps < 1:
    raise InputError(
      f"shrink.sequences is {s.sequences} and shrink.steps {s.steps}; each is at least 1"
    )
  L, here = config.num_hidden_layers, axes(family, config)
  if s.layers > L and s.layers_by != "even":
    raise InputError(
      f"shrink.layers is {s.layers} and the teacher has {L}; a deeper student has some of them "
      "twice, which shrink.layers_by=even chooses"
    )
  for key, (_, axis) in SIZES.items():
    if not (n := getattr(s, key)):
      continue
    if axis not in here or not field(config, key):
      raise InputError(f"shrink.{key} is {n} and this {family} model has none; leave it at 0")
    if n > (most := getattr(config, field(config, key))):
      raise InputError(
        f"shrink.{key} is {n} and the teacher has {most}; a student gets at most as many from it"
      )


def narrowed(s: ShrinkOptions, family: str, config: Any) -> Any:
  """The Config of the narrower model, with all of the teacher's layers.

  Raises:
    InputError: the teacher has fewer of something, or the family cannot have that shape.
  """
  check(s, family, config)
  new = {field(config, k): getattr(s, k) for k in SIZES if getattr(s, k)}
  new |= _heads(s, config)
  for key in ("experts",):
    groups = getattr(config, "n_group", 1)  # of experts, each keeps as many
    if getattr(s, key) % groups:
      raise InputError(
        f"shrink.experts is {s.experts}, and experts are routed in {groups} equal groups; take a "
        "multiple"
      )
  return dataclasses.replace(config, **new)


def _heads(s: ShrinkOptions, config: Any) -> dict[str, int]:
  """How many query and key/value heads, where either changes."""
  H, G = config.num_attention_heads, config.num_key_value_heads
  if not (s.heads or s.kv_heads):
    return {}
  if s.kv_heads_by == "merge" and s.kv_heads and G % s.kv_heads:
    raise InputError(
      f"shrink.kv_heads is {s.kv_heads} and {G} key/value heads are merged evenly; take a divisor"
    )
  merged = s.kv_heads_by == "merge" and s.kv_heads
  # Where every query head has keys of its own, they go together.
  groups = s.kv_heads or (s.heads if H == G else G)
  heads = s.heads or (H if merged else H // G * groups)
  of_a_group = H // groups if merged else H // G
  if heads % groups or heads // groups > of_a_group:
    raise InputError(
      f"shrink keeps {heads} heads over {groups} key/value heads, and each of those has "
      f"{of_a_group} of the teacher's; take a multiple of {groups} up to {groups * of_a_group}"
    )
  return {"num_attention_heads": heads, "num_key_value_heads": groups}


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of a shape: its parameters, and those that one token of one text needs read."""

  parameters: int
  active: int


def cost(family: str, config: Any) -> Cost:
  """Counted from the declarations.

  A token reads a row of the embedding table, unless the table is the head too, and the
  experts it is routed to.
  """
  chosen = getattr(config, "num_experts_per_tok", None)
  total = active = 0
  for path, v in params.named_params(abstract(family, config)):
    n = math.prod(v.shape)
    total += n
    if path == "embed" and not config.tie_word_embeddings:
      continue
    active += n * chosen // v.shape[_names(v).index("experts")] if "experts" in _names(v) else n
  return Cost(total, active)
