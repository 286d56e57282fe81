"""Configs of narrower models, and their numbers of parameters, without reading weights."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
from flax import nnx

from distill_jax import registry
from distill_jax.errors import bad_value, check_choice
from distill_jax.models import DecoderConfig, DecoderModel
from distill_jax.nn import params
from distill_jax.pruning.options import ShrinkOptions


class SizeKey(NamedTuple):
  """The meaning of a size in ShrinkOptions: a field of a family's Config, and a named axis."""

  fields: tuple[str, ...]  # the families' names of the field
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
  """Returns the shapes of a model."""
  make = registry.load("models", family).Model
  return jax.eval_shape(lambda key: make(config, key), jax.random.key(0))


def family_of(config: object) -> str:
  """Returns the family of a Config: a module of distill_jax/models."""
  return type(config).__module__.rpartition(".")[2]


def axis_names(family: str, config: DecoderConfig) -> set[str]:
  """Returns the names of all axes of a model's parameters."""
  return {a for _, v in params.named_params(abstract(family, config)) for a in _axes(v)}


def _axes(v: nnx.Variable) -> tuple[str, ...]:
  return v.get_metadata()["axes"]


def field(config: DecoderConfig, key: str) -> str:
  """Returns the field of a Config for a key of SIZES; "" if it does not have one."""
  has = {f.name for f in dataclasses.fields(config)}
  fields = (f for f in SIZES[key].fields if f in has and getattr(config, f) is not None)
  return next(fields, "")


def count(config: DecoderConfig, key: str) -> int:
  """Returns a Config's value for a key of SIZES; 0 if it does not have one."""
  name = field(config, key)
  return getattr(config, name) if name else 0


def check(options: ShrinkOptions, family: str, config: DecoderConfig) -> None:
  """Checks that the options are valid for a teacher.

  Raises:
    InputError: they are not.
  """
  _check_options(options)
  L, axes = config.num_hidden_layers, axis_names(family, config)
  if options.layers > L and options.layers_by != "even":
    expected = f"at most {L}, the teacher's number of layers, unless layers are repeated"
    action = "Set shrink.layers_by='even' to repeat layers"
    raise bad_value("shrink.layers", options.layers, expected, action)
  for key, size in SIZES.items():
    n = getattr(options, key)
    if not n:
      continue
    if size.axis not in axes or not field(config, key):
      expected = f"0, since this {family} model does not have this size"
      raise bad_value(f"shrink.{key}", n, expected, "Remove it")
    if n > count(config, key):
      expected = f"at most {count(config, key)}, the teacher's value"
      raise bad_value(f"shrink.{key}", n, expected, "Lower it")
  if options.experts % config.expert_groups:
    expected = f"a multiple of {config.expert_groups}, the number of groups of experts"
    raise bad_value("shrink.experts", options.experts, expected, "Change it")


def _check_options(options: ShrinkOptions) -> None:
  """Checks the options that do not depend on the teacher."""
  for key, choices in CHOICES.items():
    check_choice(f"shrink.{key}", getattr(options, key), choices, "Choose one")
  if options.window < 0:
    expected = "a positive number, or 0 for the teacher's attention"
    raise bad_value("shrink.window", options.window, expected, "Change it")
  for key in ("layers", *SIZES):
    if (n := getattr(options, key)) < 0:
      expected = "a positive number, or 0 for the teacher's value"
      raise bad_value(f"shrink.{key}", n, expected, "Change it")
  for key in ("sequences", "steps"):
    if (n := getattr(options, key)) < 1:
      raise bad_value(f"shrink.{key}", n, "a positive number", "Change it")


def narrowed(options: ShrinkOptions, family: str, config: DecoderConfig) -> DecoderConfig:
  """Returns the Config of the narrower model, with all of the teacher's layers.

  Args:
    options: the sizes.
    family: the teacher's family.
    config: the teacher's Config.

  Raises:
    InputError: a size is larger than the teacher's, or the family does not support it.
  """
  check(options, family, config)
  sizes = {field(config, key): getattr(options, key) for key in SIZES if getattr(options, key)}
  return dataclasses.replace(config, **sizes | _head_counts(options, config))


def _head_counts(options: ShrinkOptions, config: DecoderConfig) -> dict[str, int]:
  """Returns the numbers of query and key/value heads of the narrower model, if they change.

  The query heads of dropped key/value heads are dropped too. If key/value heads are merged, all
  query heads are kept and share fewer keys.
  """
  H, G = config.num_attention_heads, config.num_key_value_heads
  if not (options.heads or options.kv_heads):
    return {}
  if options.kv_heads_by == "merge" and options.kv_heads:
    if G % options.kv_heads:
      expected = f"a divisor of {G}, the teacher's number, since kv_heads_by is 'merge'"
      raise bad_value("shrink.kv_heads", options.kv_heads, expected, "Choose a divisor")
    groups, heads_per_group = options.kv_heads, H // options.kv_heads
    heads = options.heads or H
  else:
    all_heads = options.heads if H == G else G  # with H == G, each query head has its own keys
    groups, heads_per_group = options.kv_heads or all_heads, H // G
    heads = options.heads or heads_per_group * groups
  if heads % groups or heads // groups > heads_per_group:
    expected = (
      f"a multiple of {groups} up to {groups * heads_per_group}, since {groups} key/value heads "
      f"with at most {heads_per_group} query heads each are kept"
    )
    raise bad_value("shrink.heads", heads, expected, "Change it, or the number of key/value heads")
  return {"num_attention_heads": heads, "num_key_value_heads": groups}


@dataclasses.dataclass(frozen=True)
class Cost:
  """The numbers of a model's parameters, and of those that decoding one token reads."""

  parameters: int
  active: int


def cost(family: str, config: Any) -> Cost:
  """Counts the parameters of a model from their declarations.

  A token reads only the experts to which it is routed. It reads only one row of an embedding table
  that is not also the head; such a table is not counted as active.
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
