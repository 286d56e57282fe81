"""A model's layers one by one, and the cache that they decode with.

Training scans over stacked layers, which compiles fast. A decode step does little with each
weight, so it cannot afford what a scan does: copy every layer's weights and cache out of the
stack, and the cache back into it. Decoding therefore runs unrolled layers, each with arrays
of its own.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding

from distill_jax.models import DecoderCache as Cache
from distill_jax.nn import kv_cache, params
from distill_jax.nn.layers import ComputeConfig
from distill_jax.types import Inputs, Output


class Unrolled(struct.PyTreeNode):
  """A model whose stacks of layers are replaced by `blocks`, its layers in order."""

  rest: Any  # the family's Model without its stacks
  blocks: tuple[Any, ...]

  def decode_step(
    self, inputs: Inputs, cache: Cache, compute: ComputeConfig
  ) -> tuple[Output, Cache]:
    """See models/_decoder.Model.decode_step."""
    return self.rest.decode_step(self.blocks, inputs, cache, compute)


def unroll(model: Any, compute: ComputeConfig) -> Unrolled:
  """Takes a model apart, and its memory: `model` cannot be used afterwards.

  Weights are in the compute dtype from here on, and sharded as they were. Of no more than
  one stacked parameter is there ever a second copy.
  """
  stacks = [(getattr(model, name), n) for name, _, n in model.layer_stacks(model.config)]
  blocks: list[Any] = []
  for stack, n in stacks:
    leaves, tree = jax.tree.flatten(stack, is_leaf=params.is_param)
    parts = [_apart(v, compute) for v in leaves]
    blocks += [jax.tree.unflatten(tree, [p[i] for p in parts]) for i in range(n)]
  rest = params.map_params(lambda v: v, model)  # a copy of the tree, not of its arrays
  for name, _, _ in model.layer_stacks(model.config):
    setattr(rest, name, None)
  return Unrolled(params.map_params(functools.partial(_cast, compute=compute), rest), tuple(blocks))


def _apart(v: Any, compute: ComputeConfig) -> Any:
  """The parameters of the layers that a stacked one holds, which is deleted."""
  x, axes = v[...], v.get_metadata()["axes"][1:]
  dtype = "float32" if v.get_metadata()["exact"] else compute.dtype
  where = None
  if isinstance(x.sharding, NamedSharding):
    where = NamedSharding(x.sharding.mesh, compute.rules.spec(axes, "storage"))
  split = jax.jit(lambda x: [x[i].astype(dtype) for i in range(x.shape[0])], out_shardings=where)
  parts = jax.block_until_ready(split(x))
  x.delete()
  return [v.replace(part, axes=axes) for part in parts]


def _cast(v: Any, compute: ComputeConfig) -> Any:
  return v if v.get_metadata()["exact"] else v.replace(v[...].astype(compute.dtype))


def empty_cache(
  unrolled: Unrolled, rows: int, size: int, compute: ComputeConfig, mesh: Mesh, dtype: str = ""
) -> Cache:
  """Zeros for `rows` sequences of up to `size` positions, sharded as the rules compute them.

  `dtype` is one of _cache.DTYPES: "" the compute dtype, "int8" integers with their scales.
  """
  one = jnp.zeros((1, 1), jnp.int32)
  angles, _ = unrolled.rest.position_inputs(Inputs(one, one, one))(0)
  x_BTD = jax.ShapeDtypeStruct((1, 1, unrolled.rest.config.hidden_size), compute.dtype)

  def of(block: Any) -> dict[str, jax.Array]:
    _, kept = jax.eval_shape(lambda b, x: b.project_for_cache(x, angles), block, x_BTD)
    parts = (kv_cache.shapes(x, name, block.CACHE[name], dtype) for name, x in kept.items())
    return {name: zeros(*part) for named in parts for name, part in named.items()}

  def zeros(of_one: tuple[int, ...], dtype: Any, axes: str) -> jax.Array:
    shape = [rows, *of_one[2:]]
    shape.insert(axes.split().index("seq"), size)
    where = NamedSharding(mesh, compute.rules.spec(tuple(axes.split()), "compute"))
    return jnp.zeros(shape, dtype, device=where)

  return tuple(of(block) for block in unrolled.blocks)
