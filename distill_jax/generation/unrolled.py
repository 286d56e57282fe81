"""Models with unrolled layers for decoding, and their KV cache.

Training scans over stacked layers, which compile fast. A scan copies every layer's weights and
cache out of the stack, and the cache back into it. A decode step does so little work per weight
that these copies would dominate. Decoding therefore uses unrolled layers, each with its own arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.sharding import Mesh, NamedSharding

from distill_jax.models import DecoderBlock, DecoderModel
from distill_jax.models import DecoderCache as Cache
from distill_jax.nn import kv_cache, params
from distill_jax.nn.layers import ComputeConfig
from distill_jax.types import Inputs, Model, Output

PROGRAMS = 256  # compiled functions that convert weights, which a process keeps for the next time


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


def unroll(model: Model, compute: ComputeConfig, column: str = "storage") -> Unrolled:
  """Unrolls a model. The arrays of `model` are deleted, so it cannot be used afterwards.

  The weights are converted to the compute dtype. At most one stacked parameter is in memory twice
  at a time.

  Args:
    model: The model.
    compute: The compute settings.
    column: The column of the rules by which the weights are sharded afterwards: "storage" keeps
      their sharding, "compute" gathers them; see placement.py.
  """
  decoder = cast(DecoderModel, model)
  blocks: list[DecoderBlock] = []
  for name, _, n in decoder.layer_stacks(decoder.config):
    leaves, tree = jax.tree.flatten(getattr(model, name), is_leaf=params.is_param)
    parts = [_split_layers(v, compute, column) for v in leaves]
    blocks += [jax.tree.unflatten(tree, [p[i] for p in parts]) for i in range(n)]
  rest = _without_stacks(model)
  place = functools.partial(_cast, compute=compute, column=column)
  return Unrolled(params.map_params(place, rest), tuple(blocks))


def unrolled_shapes(model: Model, compute: ComputeConfig, mesh: Mesh, column: str) -> Unrolled:
  """Returns the shapes of a model after `unroll`, with shardings.

  Args:
    model: The model, or its shapes.
    compute: The compute settings.
    mesh: The devices.
    column: See `unroll`.
  """

  def shape_of(v: nnx.Variable, stacked: bool = False) -> nnx.Variable:
    axes, shape = v.get_metadata()["axes"][stacked:], v.shape[stacked:]
    where = NamedSharding(mesh, compute.rules.spec(axes, column))
    x = jax.ShapeDtypeStruct(shape, _dtype(v, compute), sharding=where)
    return v.replace(x, axes=axes)

  decoder = cast(DecoderModel, model)
  blocks: list[DecoderBlock] = []
  for name, _, n in decoder.layer_stacks(decoder.config):
    of_layer = functools.partial(shape_of, stacked=True)
    blocks += [params.map_params(of_layer, getattr(model, name))] * n
  return Unrolled(params.map_params(shape_of, _without_stacks(model)), tuple(blocks))


def _without_stacks(model: Model) -> DecoderModel:
  """Returns a model without its stacks of layers: a copy of the tree, not of its arrays."""
  rest = cast(DecoderModel, params.map_params(lambda v: v, model))
  for name, _, _ in rest.layer_stacks(rest.config):
    setattr(rest, name, None)
  return rest


def _dtype(v: nnx.Variable, compute: ComputeConfig) -> str:
  return "float32" if v.get_metadata()["exact"] else compute.dtype


def _split_layers(v: nnx.Variable, compute: ComputeConfig, column: str) -> list[nnx.Variable]:
  """Returns the parameter of each layer from a stacked one, which is deleted."""
  x, axes = v[...], v.get_metadata()["axes"][1:]
  where = _sharding(x, axes, compute, column)
  parts = jax.block_until_ready(_splitter(_dtype(v, compute), where)(x))
  x.delete()
  return [v.replace(part, axes=axes) for part in parts]


def _cast(v: nnx.Variable, compute: ComputeConfig, column: str) -> nnx.Variable:
  x, dtype = v[...], _dtype(v, compute)
  where = _sharding(x, v.get_metadata()["axes"], compute, column)
  if where is None or x.sharding.is_equivalent_to(where, x.ndim):
    return v.replace(x.astype(dtype))
  return v.replace(_caster(dtype, where)(x))


@functools.lru_cache(maxsize=PROGRAMS)
def _splitter(dtype: str, where: NamedSharding | None) -> Callable[[jax.Array], list[jax.Array]]:
  return jax.jit(lambda x: [x[i].astype(dtype) for i in range(x.shape[0])], out_shardings=where)


@functools.lru_cache(maxsize=PROGRAMS)
def _caster(dtype: str, where: NamedSharding) -> Callable[[jax.Array], jax.Array]:
  return jax.jit(lambda x: x.astype(dtype), out_shardings=where)


def _sharding(
  x: jax.Array, axes: tuple[str, ...], compute: ComputeConfig, column: str
) -> NamedSharding | None:
  """Returns the sharding of a weight of `axes`; None if `x` is not on a mesh."""
  if not isinstance(x.sharding, NamedSharding):
    return None
  return NamedSharding(x.sharding.mesh, compute.rules.spec(axes, column))


def empty_cache(
  unrolled: Unrolled, rows: int, size: int, compute: ComputeConfig, mesh: Mesh, dtype: str = ""
) -> Cache:
  """Returns an empty cache; see `cache_shapes` for the arguments."""
  shapes = cache_shapes(unrolled, rows, size, compute, mesh, dtype)
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), shapes)


def cache_shapes(
  unrolled: Unrolled, rows: int, size: int, compute: ComputeConfig, mesh: Mesh, dtype: str = ""
) -> Cache:
  """Returns the shapes of a cache, sharded by the rules of `compute`.

  Args:
    unrolled: The model, or its shapes.
    rows: The number of sequences.
    size: The maximum number of positions per sequence.
    compute: The compute settings.
    mesh: The devices.
    dtype: One of kv_cache.DTYPES: "" for the compute dtype, "int8" for integers with scales.
  """
  zero_11 = jnp.zeros((1, 1), jnp.int32)
  angles, _ = unrolled.rest.position_inputs(Inputs(zero_11, zero_11, zero_11))(0)
  x_BTD = jax.ShapeDtypeStruct((1, 1, unrolled.rest.config.hidden_size), compute.dtype)

  sizes = kv_cache.block_sizes(size, mesh.devices.flat[0].platform)

  def blocks(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, axes: str) -> Any:
    """Returns the shapes of a cached array's blocks, given its shape for one row and position."""
    names = tuple(axes.split())
    where, at = NamedSharding(mesh, compute.rules.spec(names, "compute")), names.index("seq") - 1
    shapes = ((rows, *shape[2 : 2 + at], n, *shape[2 + at :]) for n in sizes)
    return tuple(jax.ShapeDtypeStruct(x, dtype, sharding=where) for x in shapes)

  def layer_cache(block: DecoderBlock) -> kv_cache.LayerCache:
    _, cached = jax.eval_shape(lambda b, x: b.project_for_cache(x, angles), block, x_BTD)
    parts = (kv_cache.shapes(x, name, block.CACHE[name], dtype) for name, x in cached.items())
    return {name: blocks(*part) for named in parts for name, part in named.items()}

  made: dict[Hashable, kv_cache.LayerCache] = {}  # layers of one kind are traced once
  kinds = [_kind(block) for block in unrolled.blocks]
  for kind, block in zip(kinds, unrolled.blocks, strict=True):
    if kind not in made:
      made[kind] = layer_cache(block)
  return tuple(made[kind] for kind in kinds)


def _kind(block: DecoderBlock) -> Hashable:
  """Returns what the shapes of a layer's cache depend on."""
  leaves, tree = jax.tree.flatten(block)
  return tree, tuple((x.shape, x.dtype) for x in leaves)
