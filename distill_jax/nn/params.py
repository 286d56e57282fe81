"""Declarations of parameters: shape, initialiser, sharding, Hugging Face name and layout.

A model declares each parameter once, e.g. `self.q = param(key, "embed:64 heads:4 head_dim:16",
hf="...", out="heads head_dim")`. Sharding, the optimizer, import and export all use this
declaration. Four kinds of string describe a parameter:

  axes   "layers embed heads head_dim": the logical axes of an array, in order. Each has a row in
         sharding.TABLE. The metadata `axes` is a tuple of these names; sharding.constrain takes
         the string, e.g. "batch seq embed" for [B, T, D].
  dims   "embed:64 heads:4 head_dim:16": axes with their sizes.
  out    "heads head_dim": the output axes. torch's Linear weights are [out, in], so a checkpoint
         stores [prod(out), prod(other axes)]. With "", it stores the array's own layout.
  hf     "model.layers.{layers}.mlp.experts.{experts}.up_proj.weight": the tensor's name in a
         Hugging Face checkpoint. A name in braces is an axis along which the checkpoint has
         separate numbered tensors; `stack` adds the axis.

In this module `axis` is one name and `axes` are several. A misspelt axis raises an error when the
parameter is first sharded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import KeyPath

from distill_jax.types import PyTree, Tree

ENCODER_LAYERS = "encoder_layers"  # `keep_layers` applies to "layers" only
LAYERS = ("layers", ENCODER_LAYERS)  # axes along which `stack` puts the layers of a model


def param(
  key: jax.Array,
  dims: str,
  hf: str,
  out: str = "",
  init: str | float = "fan_in",
  exact: bool = False,
) -> nnx.Param:
  """Declares and initialises one parameter, in float32.

  Args:
    key: PRNG key.
    dims: the axes and their sizes; see the module's docstring.
    hf: the Hugging Face name; see the module's docstring.
    out: the output axes; see the module's docstring.
    init: "fan_in" (normal with standard deviation 1/sqrt(n), n the product of the axes not in
      `out`), "uniform" (between -1/sqrt(n) and 1/sqrt(n)), "ones", "zeros", or the standard
      deviation of a normal.
    exact: whether the parameter stays float32 when other parameters are read, used or written as
      bfloat16.

  Returns:
    An `nnx.Param` with metadata `axes`, `hf`, `out` and `exact`, and `first`, which `stack` sets.
  """
  pairs = [d.split(":") for d in dims.split()]
  axes, shape = tuple(a for a, _ in pairs), tuple(int(n) for _, n in pairs)
  out_axes = tuple(out.split())
  if init == "ones":
    value = jnp.ones(shape, jnp.float32)
  elif init == "zeros":
    value = jnp.zeros(shape, jnp.float32)
  else:
    fan_in = math.prod(n for a, n in zip(axes, shape, strict=True) if a not in out_axes)
    if init == "uniform":
      value = jax.random.uniform(key, shape, jnp.float32, -1, 1) / math.sqrt(fan_in)
    else:
      std = 1 / math.sqrt(fan_in) if init == "fan_in" else float(init)
      value = std * jax.random.normal(key, shape, jnp.float32)
  return nnx.Param(value, axes=axes, hf=hf, out=out_axes, exact=exact, first=0)


def stack(
  n: int, make: Callable[[jax.Array], Tree], key: jax.Array, axis: str = "layers", first: int = 0
) -> Tree:
  """Makes `n` copies of a module (or parameter) along a new first axis, ready for `lax.scan`.

  Args:
    n: the number of copies.
    make: makes one copy from a key.
    key: PRNG key.
    axis: the logical name of the new axis.
    first: the number of the first copy in Hugging Face's names.
  """

  def name_first_axis(v: nnx.Variable) -> nnx.Variable:  # vmap does not lift metadata
    return v.replace(axes=(axis, *v.get_metadata()["axes"]), first=first)

  return map_params(name_first_axis, jax.vmap(make)(jax.random.split(key, n)))


def unstack(layer: Tree) -> Tree:
  """Removes the first name from `axes` after `lax.scan` or indexing has removed the first axis."""
  return map_params(lambda v: v.replace(axes=v.get_metadata()["axes"][1:]), layer)


def take_layer(stacked: Tree, i: int) -> Tree:
  """Returns layer `i` of a stacked module."""
  return unstack(jax.tree.map(lambda x: x[i], stacked))


def is_param(x: object) -> TypeGuard[nnx.Variable]:
  """Returns whether a node of a tree is a parameter (a variable with its metadata)."""
  return isinstance(x, nnx.Variable)


def map_params(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
  """Applies `jax.tree.map` with parameters (variables with their metadata) as leaves."""
  return jax.tree.map(fn, tree, *rest, is_leaf=is_param)


def named_params(tree: PyTree) -> Iterator[tuple[str, nnx.Variable]]:
  """Yields (path, parameter) pairs, with a dotted path, e.g. "layers.q"."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_param):
    yield dotted(path), leaf


def dotted(path: KeyPath) -> str:
  """Returns a parameter's path in a tree as a string, e.g. "layers.q"."""
  return jax.tree_util.keystr(path, simple=True, separator=".")


def split(tree: Tree, frozen: tuple[str, ...]) -> tuple[Tree, Tree]:
  """Splits parameters into trained ones and those whose Hugging Face name starts with a prefix.

  Args:
    tree: parameters.
    frozen: the prefixes.

  Returns:
    (trained, frozen), two trees like `tree`, each with None in place of the other's arrays.
  """

  def is_frozen(v: PyTree) -> bool:
    return is_param(v) and v.get_metadata()["hf"].startswith(frozen)

  def only(wanted: bool) -> Tree:
    return map_params(
      lambda v: v if is_frozen(v) == wanted else jax.tree.map(lambda _: None, v), tree
    )

  return only(False), only(True)


def join(trained: Tree, frozen: Tree | None) -> Tree:
  """Returns the tree that `split` has split; `frozen` may be None if it has no arrays."""
  if frozen is None:
    return trained
  return jax.tree.map(
    lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda x: x is None
  )


def replace(tree: Tree, values: Mapping[str, PyTree]) -> Tree:
  """Returns the tree with the values of some parameters replaced.

  Args:
    tree: parameters.
    values: new values by dotted path.
  """

  def replaced(path: KeyPath, v: nnx.Variable) -> nnx.Variable:
    name = dotted(path)
    return v.replace(values[name]) if name in values else v

  return jax.tree_util.tree_map_with_path(replaced, tree, is_leaf=is_param)


def count(tree: PyTree) -> int:
  """Returns the total number of elements of all parameters."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
