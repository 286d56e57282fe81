"""The shape of a narrower model, and what a shape costs, with no weight read or made."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
from flax import nnx

from distill_jax import registry
from distill_jax.errors import InputError
from distill_jax.models import DecoderConfig, DecoderModel
from distill_jax.nn import params
from distill_jax.pruning.options import ShrinkOptions


class SizeKey(NamedTuple):
  """What a size in ShrinkOptions changes: the field of a family's Config, and a named axis."""

  fields: tuple[str, ...]  # what families call that number
  axis: str


SIZES = {
  "hidden": SizeKey(("hidden_size",), "table"),
  "intermediate": SizeKey(("intermediate_size",), "mlp"),
  "heads": SizeKey(("num_attention_heads",), "heads"),
  "kv_heads": SizeKey(("num_key_value_heads",), "kv_heads"),
  "experts": SizeKey(("num_experts", "n_routed_experts"), "experts"),
  "expert_intermediate": SizeKey(("moe_intermediate_size",), "expert_mlp"),
}
CHOICES = {
  "layers_by": ("even", "ends", "influence", "loss"),
  "kv_heads_by": ("drop", "merge"),
  "experts_by": ("drop", "merge"),
}


@functools.lru_cache(maxsize=256)
def abstract(family: str, config: DecoderConfig) -> DecoderModel:
  """Returns a family's model as shapes."""
  make = registry.load("models", family).Model
  return jax.eval_shape(lambda key: make(config, key), jax.random.key(0))


def family_of(config: object) -> str:
  """The module of distill_jax/models whose Config it is."""
  return type(config).__module__.rpartition(".")[2]


def axis_names(family: str, config: DecoderConfig) -> set[str]:
  """The names of all axes that a model's parameters have."""
  return {a for _, v in params.named_params(abstract(family, config)) for a in _axes(v)}


def _axes(v: nnx.Variable) -> tuple[str, ...]:
  return v.get_metadata()["axes"]


def field(config: DecoderConfig, key: str) -> str:
  """What a Config calls the number that a key of SIZES sets; "" where it has none."""
  has = {f.name for f in dataclasses.fields(config)}
  fields = (f for f in SIZES[key].fields if f in has and getattr(config, f) is not None)
  return next(fields, "")


def count(config: DecoderConfig, key: str) -> int:
  """The number that a key of SIZES sets; 0 where a Config has none."""
  name = field(config, key)
  return getattr(config, name) if name else 0


def check(options: ShrinkOptions, family: str, config: DecoderConfig) -> None:
  """Refuses what no family, or not this one, can have."""
  _check_options(options)
  L, axes = config.num_hidden_layers, axis_names(family, config)
  if options.layers > L and options.layers_by != "even":
    raise InputError(
      f"shrink.layers is {options.layers} and the teacher has {L}; a deeper student has some of "
      "them twice, which shrink.layers_by=even chooses"
    )
  for key, size in SIZES.items():
    n = getattr(options, key)
    if not n:
      continue
    if size.axis not in axes or not field(config, key):
      raise InputError(f"shrink.{key} is {n} and this {family} model has none; leave it at 0")
    if n > count(config, key):
      raise InputError(
        f"shrink.{key} is {n} and the teacher has {count(config, key)}; a student gets at most as "
        "many from it"
      )
  if options.experts % config.expert_groups:
    raise InputError(
      f"shrink.experts is {options.experts}, and experts are routed in {config.expert_groups} "
      "equal groups; take a multiple"
    )


def _check_options(options: ShrinkOptions) -> None:
  """Refuses what no family can have."""
  for key, choices in CHOICES.items():
    if (choice := getattr(options, key)) not in choices:
      raise InputError(f"shrink.{key} is {choice!r}; it can be one of {', '.join(choices)}")
  if options.window < 0:
    raise InputError(
      f"shrink.window is {options.window}; it is at least 1, or 0 for as the teacher sees"
    )
  for key in ("layers", *SIZES):
    if (n := getattr(options, key)) < 0:
      raise InputError(f"shrink.{key} is {n}; it is at least 1, or 0 for all")
  if options.sequences < 1 or options.steps < 1:
    raise InputError(
      f"shrink.sequences is {options.sequences} and shrink.steps {options.steps}; each is at "
      "least 1"
    )


def narrowed(options: ShrinkOptions, family: str, config: DecoderConfig) -> DecoderConfig:
  """Returns the Config of the narrower model, with all of the teacher's layers.

  Raises:
    InputError: the teacher has fewer of something, or the family cannot have that shape.
  """
  check(options, family, config)
  sizes = {field(config, key): getattr(options, key) for key in SIZES if getattr(options, key)}
  return dataclasses.replace(config, **sizes | _head_counts(options, config))


def _head_counts(options: ShrinkOptions, config: DecoderConfig) -> dict[str, int]:
  """How many query and key/value heads the narrower model has, where either changes.

  Dropped key/value heads take their query heads along. Merged ones leave all query heads, which
  then share fewer keys.
  """
  H, G = config.num_attention_heads, config.num_key_value_heads
  if not (options.heads or options.kv_heads):
    return {}
  if options.kv_heads_by == "merge" and options.kv_heads:
    if G % options.kv_heads:
      raise InputError(
        f"shrink.kv_heads is {options.kv_heads} and {G} key/value heads are merged evenly; take a "
        "divisor"
      )
    groups, heads_per_group = options.kv_heads, H // options.kv_heads
    heads = options.heads or H
  else:
    all_heads = options.heads if H == G else G  # where each query head has its own keys
    groups, heads_per_group = options.kv_heads or all_heads, H // G
    heads = options.heads or heads_per_group * groups
  if heads % groups or heads // groups > heads_per_group:
    raise InputError(
      f"shrink keeps {heads} heads over {groups} key/value heads, and each of those has "
      f"{heads_per_group} of the teacher's; take a multiple of {groups} up to "
      f"{groups * heads_per_group}"
    )
  return {"num_attention_heads": heads, "num_key_value_heads": groups}


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a shape costs: its parameters, and those that are read for one token of one text."""

  parameters: int
  active: int


def cost(family: str, config: Any) -> Cost:
  """Counts the parameters of a shape from their declarations.

  A token reads a row of the embedding table, unless the table is the head too, and the
  experts it is routed to.
  """
  total = active = 0
  for path, v in params.named_params(abstract(family, config)):
    n = math.prod(v.shape)
    total += n
    if path == "embed" and not config.tie_word_embeddings:
      continue
    if "experts" in _axes(v):
      n = n * config.num_experts_per_tok // v.shape[_axes(v).index("experts")]
    active += n
  return Cost(total, active)
