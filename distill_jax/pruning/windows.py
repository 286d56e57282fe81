"""A student most of whose layers see a window, and every so-manieth all that came before.

What such a layer keeps of a text, and reads for its next token, ends at the window.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import registry
from distill_jax.errors import InputError
from distill_jax.models import GLOBAL, LOCAL
from distill_jax.nn import params, sharding
from distill_jax.pruning import shapes
from distill_jax.pruning.options import ShrinkOptions

# The family in whose words transformers has layers of both kinds. A Llama is a Qwen2 without
# biases, and rope is the same in all of its kinds.
INTO = {"llama": "qwen2", "qwen2": "qwen2", "qwen3": "qwen3"}


def windowed(s: ShrinkOptions, config: Any) -> Any:
  """The Config, of another family perhaps, of a student of this one that has windows.

  Raises:
    InputError: the family cannot have them.
  """
  family = shapes.family_of(config)
  if s.global_every < 0:
    raise InputError(
      f"shrink.global_every is {s.global_every}; it is at least 2, or 0 where no layer sees all"
    )
  if family not in INTO or getattr(config, "num_experts", None) is not None:
    raise InputError(
      f"shrink.window is {s.window} and transformers has no windows in some layers of a {family} "
      f"model like this one; teachers of {', '.join(INTO)} without experts can be given them"
    )
  if config.sliding_window is not None:
    raise InputError(
      f"shrink.window is {s.window} and the teacher has a window of {config.sliding_window} "
      "already; leave shrink.window at 0 to keep it"
    )
  L, every = config.num_hidden_layers, s.global_every
  if every > L:
    raise InputError(
      f"shrink.global_every is {every} and the student has {L} layers, so that none sees all; take "
      f"2 to {L}, or 0 if that is meant"
    )
  types = tuple(GLOBAL if every and (i + 1) % every == 0 else LOCAL for i in range(L))
  if LOCAL not in types:
    raise InputError(
      f"shrink.global_every is {every} of {L} layers, so that all see all and none has the window "
      f"of {s.window}; make it at least 2, or leave shrink.window at 0"
    )
  new = registry.load("models", INTO[family]).Config
  of = {f.name: getattr(config, f.name) for f in dataclasses.fields(new) if hasattr(config, f.name)}
  return new(**of | {"sliding_window": s.window, "layer_types": types})


def see(model: Any, config: Any, mesh: Any, rules: sharding.Rules) -> Any:
  """The model as one of `windowed`'s Config: the same weights, and biases of 0."""
  like = shapes.abstract(shapes.family_of(config), config)
  where = sharding.shardings(like, mesh, rules)

  def make(model: Any) -> Any:
    have = {path: v[...] for path, v in params.named_params(model)}
    zeros = {p: jnp.zeros(v.shape) for p, v in params.named_params(like) if p not in have}
    return params.replace(like, zeros | have)

  return jax.jit(make, out_shardings=where, donate_argnums=0)(model)
