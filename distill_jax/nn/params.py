"""One declaration a parameter: shape, initialiser, sharding, Hugging Face name and layout.

A model declares `self.q = param(key, "embed:64 heads:4 head_dim:16", hf="...", out="heads
head_dim")` once; sharding.py, optim.py and hub/ read everything they need from it, so
import, export and sharding cannot be forgotten or disagree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def param(
  key: jax.Array,
  dims: str,
  hf: str,
  out: str = "",
  init: str | float = "fan_in",
  exact: bool = False,
):
  """Declares and initialises one parameter, in float32.

  Args:
    key: PRNG key.
    dims: our axes and sizes in order, as "embed:64 heads:4 head_dim:16".
    hf: the tensor's name in a Hugging Face checkpoint. `{layers}` and `{experts}` are
      axes that Hugging Face spreads over tensors, added by `stack`.
    out: the axes that torch puts first (its Linear weights are [out, in]), in order. The
      stored tensor is [prod(out), prod(the rest)]; without `out` it is stored as it is.
    init: "fan_in" (normal, deviation 1/sqrt(n), n the product of the axes not in `out`),
      "uniform" (between -1/sqrt(n) and 1/sqrt(n)), "ones", "zeros", or the standard deviation
      of a normal.
    exact: it stays float32 where the others are read, used or written as bfloat16.

  Returns:
    An `nnx.Param` with metadata `axes`, `hf`, `out` and `exact`, and `first`, which `stack` sets.
  """
  pairs = [d.split(":") for d in dims.split()]
  axes, shape = tuple(a for a, _ in pairs), tuple(int(n) for _, n in pairs)
  first = tuple(out.split())
  if init == "ones":
    value = jnp.ones(shape, jnp.float32)
  elif init == "zeros":
    value = jnp.zeros(shape, jnp.float32)
  else:
    fan_in = math.prod(n for a, n in zip(axes, shape, strict=True) if a not in first)
    if init == "uniform":
      value = jax.random.uniform(key, shape, jnp.float32, -1, 1) / math.sqrt(fan_in)
    else:
      std = 1 / math.sqrt(fan_in) if init == "fan_in" else float(init)
      value = std * jax.random.normal(key, shape, jnp.float32)
  return nnx.Param(value, axes=axes, hf=hf, out=first, exact=exact, first=0)


def stack(
  n: int, make: Callable[[jax.Array], Any], key: jax.Array, axis: str = "layers", first: int = 0
) -> Any:
  """`n` copies of a module (or parameter) along a new first axis, ready for `lax.scan`.

  `first` is the number that Hugging Face gives to the first layer of the stack.
  """
  stacked = jax.vmap(make)(jax.random.split(key, n))
  # vmap does not lift metadata: the new axis gets its name here.
  named = lambda v: v.replace(axes=(axis, *v.get_metadata()["axes"]), first=first)
  return map_params(named, stacked)


def unstack(layer: Any) -> Any:
  """Takes the first axis' name off parameters that `lax.scan` or indexing took it from."""
  return map_params(lambda v: v.replace(axes=v.get_metadata()["axes"][1:]), layer)


def take_layer(stacked: Any, i: int) -> Any:
  """One layer of a stack, as the stacked module is without its first axis."""
  return unstack(jax.tree.map(lambda x: x[i], stacked))


def is_param(x: Any) -> bool:
  return isinstance(x, nnx.Variable)


def map_params(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
  """`jax.tree.map` whose leaves are whole parameters, metadata and all."""
  return jax.tree.map(fn, tree, *rest, is_leaf=is_param)


def named_params(tree: Any) -> Iterator[tuple[str, Any]]:
  """(path, parameter) pairs; the path is dotted, as "layers.q"."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_param):
    yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def trainable_mask(tree: Any, frozen: tuple[str, ...]) -> Any:
  """False for the parameters whose Hugging Face name begins with one of `frozen`."""

  def one(v):
    hf = v.get_metadata()["hf"] if is_param(v) else ""
    return jax.tree.map(lambda _: not hf.startswith(frozen), v)

  return map_params(one, tree)


def replace(tree: Any, values: dict[str, Any]) -> Any:
  """The tree with these values, by path, in the place of its own."""

  def one(path, v):
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return v.replace(values[name]) if name in values else v

  return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_param)


def count(tree: Any) -> int:
  """How many numbers the parameters hold."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
