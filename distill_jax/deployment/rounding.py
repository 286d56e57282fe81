"""Models whose weights are rounded as a file stores them, one tensor of a layer after another.

The weights of a layer change in place: in addition to the model, a process holds its part of one
tensor of one layer. The experts of a layer are one tensor, as in a GGUF file. A program is compiled
for each shape and width, not for each tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Sharding

from distill_jax.nn import grids, params, quantise
from distill_jax.types import Model

FLOATS = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}


class Width(NamedTuple):
  """The numbers in which a tensor is stored.

  Attributes:
    numbers: one of FLOATS or of grids.GRIDS.
    group: for "int8" and "int4", the number of inputs that share a scale; 0: all of an output.
  """

  numbers: str
  group: int = 0


class LayerTensor(NamedTuple):
  """A linear weight of one layer, with experts that of all of them.

  Attributes:
    path: the dotted path of the parameter, which has all layers of a stack.
    layer: the index of the layer in the parameter.
  """

  path: str
  layer: int


def layer_tensors(model: Model) -> list[LayerTensor]:
  """Returns the linear weights of the layers of a model, or of its shapes."""
  stacks = ((path, v) for path, v in params.named_params(model) if quantise.is_quantised(v))
  return [LayerTensor(path, i) for path, v in stacks for i in range(v.shape[0])]


def round_model(model: Model, widths: Mapping[LayerTensor, Width], table: Width) -> Model:
  """Returns a float32 model with rounded weights; those of its layers are donated.

  Args:
    model: the model.
    widths: the widths of the linear weights of layers.
    table: the width of the embedding table and the head.
  """
  for tensor, width in widths.items():
    model, _ = round_tensor(model, tensor, width)
  tables = {p: v for p, v in params.named_params(model) if "vocab" in v.get_metadata()["axes"]}
  return params.replace(
    model, {p: _whole(table, v[...].sharding, _axes(v))(v[...]) for p, v in tables.items()}
  )


def round_tensor(model: Model, tensor: LayerTensor, width: Width) -> tuple[Model, jax.Array]:
  """Returns the model with one rounded tensor, and that tensor before. The parameter is donated."""
  v = dict(params.named_params(model))[tensor.path]
  rounded = _one_layer(width, v[...].sharding, _axes(v))
  stack, before = rounded(v[...], tensor.layer)
  return params.replace(model, {tensor.path: stack}), before


def put_back(model: Model, tensor: LayerTensor, before: jax.Array) -> Model:
  """Returns the model that `round_tensor` was given. The parameter is donated."""
  v = dict(params.named_params(model))[tensor.path]
  stack = _set_layer(v[...].sharding)(v[...], before, tensor.layer)
  return params.replace(model, {tensor.path: stack})


class Axes(NamedTuple):
  """The names of the axes of a tensor of one layer.

  Attributes:
    names: all of them.
    out: those of its outputs.
  """

  names: tuple[str, ...]
  out: tuple[str, ...]


def _axes(v: nnx.Variable) -> Axes:
  """Returns the axes of a parameter, without that of layers."""
  meta = v.get_metadata()
  return Axes(tuple(a for a in meta["axes"] if a not in params.LAYERS), tuple(meta["out"]))


def stored(x: jax.Array, width: Width, axes: Axes) -> jax.Array:
  """Returns the values of a tensor after it was stored at a width, in float32."""
  if width.numbers in FLOATS:
    # Without the barrier, the compiler may remove the two casts.
    return jax.lax.optimization_barrier(x.astype(FLOATS[width.numbers])).astype(jnp.float32)
  return quantise.on_rows(x, *axes, lambda rows: grids.on_grid(rows, *width))


@functools.cache
def _one_layer(
  width: Width, sharding: Sharding, axes: Axes
) -> Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]:
  """Returns the program of `round_tensor`."""

  def rounded(stack: jax.Array, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
    before = jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)
    after = stored(before, width, axes)
    return jax.lax.dynamic_update_index_in_dim(stack, after, layer, 0), before

  return jax.jit(rounded, out_shardings=(sharding, None), donate_argnums=0)


@functools.cache
def _set_layer(sharding: Sharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
  update = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0)
  return jax.jit(update, out_shardings=sharding, donate_argnums=0)


@functools.cache
def _whole(width: Width, sharding: Sharding, axes: Axes) -> Callable[[jax.Array], jax.Array]:
  return jax.jit(functools.partial(stored, width=width, axes=axes), out_shardings=sharding)
