"""Students with sliding-window attention in most layers and full attention in every N-th.

A layer with a window caches and reads only the positions in the window.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import registry
from distill_jax.errors import bad_value
from distill_jax.models import GLOBAL, LOCAL, DecoderConfig, DecoderModel
from distill_jax.nn import params, sharding
from distill_jax.pruning import shapes
from distill_jax.pruning.options import ShrinkOptions

# For each family, the one in which transformers supports both kinds of layer. A Llama is a Qwen2
# without biases, and all of them have the same rope scalings.
WINDOWED_FAMILY = {"llama": "qwen2", "qwen2": "qwen2", "qwen3": "qwen3"}


def windowed(options: ShrinkOptions, config: Any) -> DecoderConfig:
  """Returns a student's Config with windows, which may be of another family.

  Args:
    options: the options of `shrink`.
    config: the student's Config without windows.

  Raises:
    InputError: the family does not support windows, or the options do not fit.
  """
  family = shapes.family_of(config)
  if options.global_every < 0:
    expected = "at least 2, or 0 for windows in all layers"
    raise bad_value("shrink.global_every", options.global_every, expected, "Change it")
  if family not in WINDOWED_FAMILY or shapes.count(config, "experts"):
    expected = (
      f"0 for this {family} model, since transformers supports windows in some layers only for "
      f"{', '.join(WINDOWED_FAMILY)} without experts"
    )
    raise bad_value("shrink.window", options.window, expected, "Remove it, or use another teacher")
  if config.sliding_window is not None:
    expected = f"0, since the teacher already has a window of {config.sliding_window}"
    raise bad_value("shrink.window", options.window, expected, "Remove it to keep that window")
  L, every = config.num_hidden_layers, options.global_every
  if every > L:
    expected = f"a number from 2 to {L}, the number of layers, or 0 for windows in all layers"
    raise bad_value("shrink.global_every", every, expected, "Change it")
  types = tuple(GLOBAL if every and (i + 1) % every == 0 else LOCAL for i in range(L))
  if LOCAL not in types:
    expected = "at least 2, since with 1 all layers have full attention"
    raise bad_value("shrink.global_every", every, expected, "Change it, or remove shrink.window")
  new = registry.load("models", WINDOWED_FAMILY[family]).Config
  names = {f.name for f in dataclasses.fields(new)}
  same = {name: value for name, value in vars(config).items() if name in names}
  return new(**same | {"sliding_window": options.window, "layer_types": types})


def with_windows(
  model: DecoderModel, config: DecoderConfig, mesh: jax.sharding.Mesh, rules: sharding.Rules
) -> DecoderModel:
  """Returns the model with windows: the same weights, and biases of 0 if the family has biases.

  Args:
    model: the model without windows. Its arrays are donated.
    config: the Config from `windowed`.
    mesh: the mesh.
    rules: the rules of the model.
  """
  abstract = shapes.abstract(shapes.family_of(config), config)

  def make(model: DecoderModel) -> DecoderModel:
    values = {path: v[...] for path, v in params.named_params(model)}
    zeros = {p: jnp.zeros(v.shape) for p, v in params.named_params(abstract) if p not in values}
    return params.replace(abstract, zeros | values)

  out_shardings = sharding.shardings(abstract, mesh, rules)
  return jax.jit(make, out_shardings=out_shardings, donate_argnums=0)(model)
