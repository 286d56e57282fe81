"""Quantisation-aware training of students with integer weights (arXiv:1712.05877, section 3).

A linear weight is used as it will be stored: as integers with a scale for each output and group of
inputs (grids.py). The gradient ignores the rounding (straight-through, arXiv:1308.3432).
Embeddings, norms, biases, routers and the head are not quantised.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.errors import InputError, bad_value
from distill_jax.nn import grids, params
from distill_jax.types import Model, Tree


@dataclasses.dataclass(frozen=True)
class QuantiseOptions:
  """Integer weights of linear layers, in training and afterwards: see nn/quantise.py."""

  grid: str = ""
  """Numbers of the weights: "int8" or "int4" (integers with bfloat16 scales, compressed-tensors in
  an export), "Q8_0" or "Q4_0" (those of GGUF), or "" for weights that are not quantised."""
  group: int = 0
  """Number of consecutive inputs that share a scale, for "int8" and "int4". 0: one scale for each
  output. "Q8_0" and "Q4_0" have groups of 32."""


UNROUNDED = QuantiseOptions()
LOOPS = (*params.LAYERS, "experts")  # axes along which weights are separate tensors


def check(spec: QuantiseOptions, model: Model) -> None:
  """Checks that the options fit a model (or its shapes).

  Raises:
    InputError: they do not.
  """
  if spec.grid not in ("", *grids.GRIDS):
    expected = f"one of {', '.join(grids.GRIDS)}, or an empty string for none"
    raise bad_value("student.quantise.grid", spec.grid, expected, "Choose one")
  if spec.group < 0:
    expected = "a number of inputs, or 0 for all inputs of an output"
    raise bad_value("student.quantise.group", spec.group, expected, "Change it")
  if spec.group and spec.grid not in grids.PACKED:
    expected = f"0 because student.quantise.grid is {spec.grid!r}"
    raise bad_value("student.quantise.group", spec.group, expected, "Remove the key")
  for path, v in params.named_params(model) if spec.grid else ():
    if is_quantised(v) and (n := inputs(v)) % grids.inputs_per_scale(spec.grid, spec.group, n):
      raise _not_divided(spec, f"{n}, the number of inputs of {path}")


def _not_divided(spec: QuantiseOptions, what: str) -> InputError:
  if spec.grid in grids.PACKED:
    expected = f"a divisor of {what}"
    return bad_value("student.quantise.group", spec.group, expected, "Choose a divisor")
  expected = f"'int8' or 'int4' because groups of {grids.BLOCK} do not divide {what}"
  return bad_value("student.quantise.grid", spec.grid, expected, "Choose one of them")


def is_quantised(v: nnx.Variable) -> bool:
  """Returns whether a parameter is a linear weight of a layer, routers excepted."""
  meta = v.get_metadata()
  return bool(meta["out"]) and "layers" in meta["hf"] and "routes" not in meta["axes"]


def rounded(v: nnx.Variable, spec: QuantiseOptions) -> nnx.Variable:
  """Returns a quantised parameter as float32 in its own shape, other parameters unchanged."""
  if not spec.grid or not is_quantised(v):
    return v
  axes, out = v.get_metadata()["axes"], v.get_metadata()["out"]
  x = v[...].astype(jnp.float32)
  return v.replace(on_rows(x, axes, out, lambda y: _straight_through(y, spec.grid, spec.group)))


def on_rows(
  x: jax.Array, axes: Sequence[str], out: Sequence[str], change: Callable[[jax.Array], jax.Array]
) -> jax.Array:
  """Returns a linear weight, in its own shape, whose rows are changed.

  Args:
    x: the weight.
    axes: the names of its axes.
    out: those of its outputs.
    change: a function of rows [..., inputs], which keeps their shape.
  """
  first = [i for i, a in enumerate(axes) if a in LOOPS or a in out]
  last = [i for i, a in enumerate(axes) if i not in first]
  y = jnp.transpose(x, first + last)
  rows = y.reshape(*y.shape[: len(first)], math.prod(y.shape[len(first) :]))
  back = sorted(range(x.ndim), key=(first + last).__getitem__)
  return jnp.transpose(change(rows).reshape(y.shape), back)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _straight_through(x: jax.Array, grid: str, group: int) -> jax.Array:
  """Returns numbers on the grid; the gradient is that of the identity."""
  return grids.on_grid(x, grid, group)


@_straight_through.defjvp
def _(
  grid: str, group: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
  return _straight_through(*primals, grid, group), tangents[0]


def tree(model: Tree, spec: QuantiseOptions) -> Tree:
  """Returns the model with its weights rounded to the grid, each in its original dtype."""

  def on_grid(v: nnx.Variable) -> nnx.Variable:
    return v.replace(rounded(v, spec)[...].astype(v.dtype))

  return params.map_params(on_grid, model)


def nbytes(model: Model, spec: QuantiseOptions) -> int:
  """Returns the bytes of the weights: integers with a scale of 2 bytes per group if quantised."""
  total = 0
  for _, v in params.named_params(model):
    n = math.prod(v.shape)
    if spec.grid and is_quantised(v):
      group = grids.inputs_per_scale(spec.grid, spec.group, inputs(v))
      total += n * grids.BITS[spec.grid] // 8 + 2 * n // group
    else:
      total += n * v.dtype.itemsize
  return total


def inputs(v: nnx.Variable) -> int:
  """Returns the number of inputs of one output of a linear weight."""
  meta = v.get_metadata()
  sizes = zip(meta["axes"], v.shape, strict=True)
  return math.prod(n for a, n in sizes if a not in LOOPS and a not in meta["out"])
