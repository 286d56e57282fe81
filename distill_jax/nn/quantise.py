"""Quantisation-aware training of students with integer weights (arXiv:1712.05877, section 3).

A linear weight W is used as s * round(W / s). Each output and group of inputs has its own scale s,
the largest |W| in the group divided by 2^(b-1) - 1, so that the rounded numbers fit b bits. The
gradient ignores the rounding (straight-through, arXiv:1308.3432). Embeddings, norms, biases,
routers and the head are not quantised.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.errors import bad_value
from distill_jax.nn import params
from distill_jax.types import Model, Tree


@dataclasses.dataclass(frozen=True)
class QuantiseOptions:
  """Integer weights of linear layers, in training and afterwards: see nn/quantise.py."""

  bits: int = 0
  """Bits of a weight: 4, 8, or 0 for weights that are not quantised."""
  group: int = 0
  """Number of consecutive inputs that share a scale. 0: one scale for each output."""


LOOPS = ("layers", "encoder_layers", "experts")  # axes along which weights are separate tensors
BITS = (0, 4, 8)


def check(spec: QuantiseOptions, model: Model) -> None:
  """Checks that the options fit a model (or its shapes).

  Raises:
    InputError: they do not.
  """
  if spec.bits not in BITS:
    raise bad_value("student.quantise.bits", spec.bits, "4, 8, or 0 for none", "Choose one")
  if spec.group < 0:
    expected = "a number of inputs, or 0 for all inputs of an output"
    raise bad_value("student.quantise.group", spec.group, expected, "Change it")
  for path, v in params.named_params(model) if spec.bits and spec.group else ():
    if is_quantised(v) and (inputs := _inputs(v)) % spec.group:
      expected = f"a divisor of {inputs}, the number of inputs of {path}"
      raise bad_value("student.quantise.group", spec.group, expected, "Choose a divisor")


def is_quantised(v: nnx.Variable) -> bool:
  """Returns whether a parameter is a linear weight of a layer, routers excepted."""
  meta = v.get_metadata()
  return bool(meta["out"]) and "layers" in meta["hf"] and "routes" not in meta["axes"]


def rounded(v: nnx.Variable, spec: QuantiseOptions) -> nnx.Variable:
  """Returns a quantised parameter as float32 in its own shape, other parameters unchanged."""
  if not spec.bits or not is_quantised(v):
    return v
  axes, out = v.get_metadata()["axes"], v.get_metadata()["out"]
  first = [i for i, a in enumerate(axes) if a in LOOPS or a in out]
  last = [i for i, a in enumerate(axes) if i not in first]
  x = v[...].astype(jnp.float32)
  rows = jnp.transpose(x, first + last)
  grouped = rows.reshape(*(x.shape[i] for i in first), -1, spec.group or _inputs(v))
  max_step = 2 ** (spec.bits - 1) - 1
  scale = jnp.max(jnp.abs(grouped), -1, keepdims=True) / max_step
  steps = jnp.round(grouped / jnp.where(scale > 0, scale, 1.0))  # within +-max_step
  back = sorted(range(x.ndim), key=(first + last).__getitem__)
  on_grid = jnp.transpose((steps * scale).reshape(rows.shape), back)
  return v.replace(x + jax.lax.stop_gradient(on_grid - x))


def tree(model: Tree, spec: QuantiseOptions) -> Tree:
  """Returns the model with its weights rounded to the grid, each in its original dtype."""

  def on_grid(v: nnx.Variable) -> nnx.Variable:
    return v.replace(rounded(v, spec)[...].astype(v.dtype))

  return params.map_params(on_grid, model)


def nbytes(model: Model, spec: QuantiseOptions) -> int:
  """Returns the bytes of the weights: b bits each if quantised, plus a bfloat16 scale per group."""
  total = 0
  for _, v in params.named_params(model):
    n = math.prod(v.shape)
    if spec.bits and is_quantised(v):
      total += n * spec.bits // 8 + 2 * n // (spec.group or _inputs(v))
    else:
      total += n * v.dtype.itemsize
  return total


def _inputs(v: nnx.Variable) -> int:
  """Returns the number of inputs of one output of a linear weight."""
  meta = v.get_metadata()
  sizes = zip(meta["axes"], v.shape, strict=True)
  return math.prod(n for a, n in sizes if a not in LOOPS and a not in meta["out"])
