"""Students with sliding-window attention in most layers and full attention in every N-th.

The cache of a layer with a window, and what it reads for the next token, end at the window.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import registry
from distill_jax.errors import InputError
from distill_jax.models import GLOBAL, LOCAL, DecoderConfig, DecoderModel
from distill_jax.nn import params, sharding
from distill_jax.pruning import shapes
from distill_jax.pruning.options import ShrinkOptions

# By family, the one in which transformers has layers of both kinds. A Llama is a Qwen2 without
# biases, and rope is the same in all of its kinds.
WINDOWED_FAMILY = {"llama": "qwen2", "qwen2": "qwen2", "qwen3": "qwen3"}


def windowed(options: ShrinkOptions, config: Any) -> DecoderConfig:
  """Returns a student's Config with windows added, perhaps of another family.

  Raises:
    InputError: the family cannot have them.
  """
  family = shapes.family_of(config)
  if options.global_every < 0:
    raise InputError(
      f"shrink.global_every is {options.global_every}; it is at least 2, or 0 where no layer sees "
      "all"
    )
  if family not in WINDOWED_FAMILY or shapes.count(config, "experts"):
    raise InputError(
      f"shrink.window is {options.window} and transformers has no windows in some layers of a "
      f"{family} model like this one; teachers of {', '.join(WINDOWED_FAMILY)} without experts can "
      "be given them"
    )
  if config.sliding_window is not None:
    raise InputError(
      f"shrink.window is {options.window} and the teacher has a window of {config.sliding_window} "
      "already; leave shrink.window at 0 to keep it"
    )
  L, every = config.num_hidden_layers, options.global_every
  if every > L:
    raise InputError(
      f"shrink.global_every is {every} and the student has {L} layers, so that none sees all; take "
      f"2 to {L}, or 0 if that is meant"
    )
  types = tuple(GLOBAL if every and (i + 1) % every == 0 else LOCAL for i in range(L))
  if LOCAL not in types:
    raise InputError(
      f"shrink.global_every is {every} of {L} layers, so that all see all and none has the window "
      f"of {options.window}; make it at least 2, or leave shrink.window at 0"
    )
  new = registry.load("models", WINDOWED_FAMILY[family]).Config
  names = {f.name for f in dataclasses.fields(new)}
  same = {name: value for name, value in vars(config).items() if name in names}
  return new(**same | {"sliding_window": options.window, "layer_types": types})


def with_windows(
  model: DecoderModel, config: DecoderConfig, mesh: jax.sharding.Mesh, rules: sharding.Rules
) -> DecoderModel:
  """Returns the model with a Config of `windowed`: the same weights, and biases of 0.

  The arrays of `model` are donated.
  """
  abstract = shapes.abstract(shapes.family_of(config), config)

  def make(model: DecoderModel) -> DecoderModel:
    values = {path: v[...] for path, v in params.named_params(model)}
    zeros = {p: jnp.zeros(v.shape) for p, v in params.named_params(abstract) if p not in values}
    return params.replace(abstract, zeros | values)

  out_shardings = sharding.shardings(abstract, mesh, rules)
  return jax.jit(make, out_shardings=out_shardings, donate_argnums=0)(model)
