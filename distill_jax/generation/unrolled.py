"""Models with unrolled layers for decoding, and their KV cache.

Training scans over stacked layers, which compile fast. A scan copies every layer's weights and
cache out of the stack, and the cache back into it. A decode step does so little work per weight
that these copies would dominate. Decoding therefore uses unrolled layers, each with its own arrays.
"""

from __future__ import annotations

import functools
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.sharding import Mesh, NamedSharding

from distill_jax.models import DecoderBlock, DecoderModel
from distill_jax.models import DecoderCache as Cache
from distill_jax.nn import kv_cache, params
from distill_jax.nn.layers import ComputeConfig
from distill_jax.types import Inputs, Model, Output


class Unrolled(struct.PyTreeNode):
  """A model with unrolled layers.

  Attributes:
    rest: The family's model without its stacks of layers.
    blocks: The layers in order.
  """

  rest: DecoderModel
  blocks: tuple[DecoderBlock, ...]

  def decode_step(
    self, inputs: Inputs, cache: Cache, compute: ComputeConfig
  ) -> tuple[Output, Cache]:
    """Runs one decode step; see models/_decoder.Model.decode_step."""
    return self.rest.decode_step(self.blocks, inputs, cache, compute)


def unroll(model: Model, compute: ComputeConfig) -> Unrolled:
  """Unrolls a model. The arrays of `model` are deleted, so it cannot be used afterwards.

  The weights are converted to the compute dtype and keep their sharding. At most one stacked
  parameter is in memory twice at a time.
  """
  decoder = cast(DecoderModel, model)
  stacks = [(getattr(model, name), n) for name, _, n in decoder.layer_stacks(decoder.config)]
  blocks: list[DecoderBlock] = []
  for stack, n in stacks:
    leaves, tree = jax.tree.flatten(stack, is_leaf=params.is_param)
    parts = [_split_layers(v, compute) for v in leaves]
    blocks += [jax.tree.unflatten(tree, [p[i] for p in parts]) for i in range(n)]
  rest = params.map_params(lambda v: v, model)  # a copy of the tree, not of its arrays
  for name, _, _ in decoder.layer_stacks(decoder.config):
    setattr(rest, name, None)
  return Unrolled(params.map_params(functools.partial(_cast, compute=compute), rest), tuple(blocks))


def _split_layers(v: nnx.Variable, compute: ComputeConfig) -> list[nnx.Variable]:
  """Returns the parameter of each layer from a stacked one, which is deleted."""
  x, axes = v[...], v.get_metadata()["axes"][1:]
  dtype = "float32" if v.get_metadata()["exact"] else compute.dtype
  layer_sharding = None
  if isinstance(x.sharding, NamedSharding):
    layer_sharding = NamedSharding(x.sharding.mesh, compute.rules.spec(axes, "storage"))

  def split(x: jax.Array) -> list[jax.Array]:
    return [x[i].astype(dtype) for i in range(x.shape[0])]

  parts = jax.block_until_ready(jax.jit(split, out_shardings=layer_sharding)(x))
  x.delete()
  return [v.replace(part, axes=axes) for part in parts]


def _cast(v: nnx.Variable, compute: ComputeConfig) -> nnx.Variable:
  return v if v.get_metadata()["exact"] else v.replace(v[...].astype(compute.dtype))


def empty_cache(
  unrolled: Unrolled, rows: int, size: int, compute: ComputeConfig, mesh: Mesh, dtype: str = ""
) -> Cache:
  """Returns an empty cache, sharded by the rules of `compute`.

  Args:
    unrolled: The model.
    rows: The number of sequences.
    size: The maximum number of positions per sequence.
    compute: The compute settings.
    mesh: The devices.
    dtype: One of kv_cache.DTYPES: "" for the compute dtype, "int8" for integers with scales.
  """
  zero_11 = jnp.zeros((1, 1), jnp.int32)
  angles, _ = unrolled.rest.position_inputs(Inputs(zero_11, zero_11, zero_11))(0)
  x_BTD = jax.ShapeDtypeStruct((1, 1, unrolled.rest.config.hidden_size), compute.dtype)

  def zeros(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, axes: str) -> jax.Array:
    """Returns zeros for a cached array, given its shape for one row and one position."""
    names = tuple(axes.split())
    whole = [rows, *shape[2:]]
    whole.insert(names.index("seq"), size)
    return jnp.zeros(whole, dtype, device=NamedSharding(mesh, compute.rules.spec(names, "compute")))

  def layer_cache(block: DecoderBlock) -> dict[str, jax.Array]:
    _, cached = jax.eval_shape(lambda b, x: b.project_for_cache(x, angles), block, x_BTD)
    parts = (kv_cache.shapes(x, name, block.CACHE[name], dtype) for name, x in cached.items())
    return {name: zeros(*part) for named in parts for name, part in named.items()}

  return tuple(layer_cache(block) for block in unrolled.blocks)
