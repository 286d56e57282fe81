"""Students with integer weights: trained as they will be used (arXiv:1712.05877, section 3).

A linear weight W is used as s round(W / s), where round stays within b bits and s is of each
output and group of inputs: the largest |W| there over 2^(b-1) - 1. The gradient passes the
rounding as if it were not there (straight-through, arXiv:1308.3432). Embeddings, norms, biases,
routers and the head stay as they are.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.errors import InputError
from distill_jax.nn import params
from distill_jax.types import Model, Tree


@dataclasses.dataclass(frozen=True)
class QuantiseOptions:
  """Integer weights of linear layers, in training and afterwards: see nn/quantise.py."""

  bits: int = 0
  """Bits of a weight: 4, 8, or 0 for weights that are not quantised."""
  group: int = 0
  """Number of consecutive inputs that share a scale. 0: one scale for each output."""


LOOPS = ("layers", "encoder_layers", "experts")  # axes along which weights are tensors of their own
BITS = (0, 4, 8)


def check(spec: QuantiseOptions, model: Model) -> None:
  """Refuses what a model (or its shapes) cannot be quantised to."""
  if spec.bits not in BITS or spec.group < 0:
    raise InputError(
      f"student.quantise has bits {spec.bits} and group {spec.group}; bits is one of {BITS}, and "
      "group a number of inputs, or 0 for all of them"
    )
  for path, v in params.named_params(model) if spec.bits and spec.group else ():
    if is_quantised(v) and (inputs := _inputs(v)) % spec.group:
      raise InputError(
        f"student.quantise.group is {spec.group} and {path} has {inputs} inputs, which it does not "
        "divide; take a divisor"
      )


def is_quantised(v: nnx.Variable) -> bool:
  """Whether a parameter is a linear weight of a layer."""
  meta = v.get_metadata()
  return bool(meta["out"]) and "layers" in meta["hf"] and "routes" not in meta["axes"]


def rounded(v: nnx.Variable, spec: QuantiseOptions) -> nnx.Variable:
  """A parameter as it is used, float32, in its own shape; what is not quantised as it is."""
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
  steps = jnp.round(grouped / jnp.where(scale > 0, scale, 1.0))  # none passes `max_step`
  back = sorted(range(x.ndim), key=(first + last).__getitem__)
  on_grid = jnp.transpose((steps * scale).reshape(rows.shape), back)
  return v.replace(x + jax.lax.stop_gradient(on_grid - x))


def tree(model: Tree, spec: QuantiseOptions) -> Tree:
  """Returns the model with its weights on the grid, each in the dtype that it had."""

  def on_grid(v: nnx.Variable) -> nnx.Variable:
    return v.replace(rounded(v, spec)[...].astype(v.dtype))

  return params.map_params(on_grid, model)


def nbytes(model: Model, spec: QuantiseOptions) -> int:
  """Bytes of the weights: b bits each where quantised, and a bfloat16 scale a group."""
  total = 0
  for _, v in params.named_params(model):
    n = math.prod(v.shape)
    if spec.bits and is_quantised(v):
      total += n * spec.bits // 8 + 2 * n // (spec.group or _inputs(v))
    else:
      total += n * v.dtype.itemsize
  return total


def _inputs(v: nnx.Variable) -> int:
  """How many inputs one output of a linear weight has."""
  meta = v.get_metadata()
  sizes = zip(meta["axes"], v.shape, strict=True)
  return math.prod(n for a, n in sizes if a not in LOOPS and a not in meta["out"])
