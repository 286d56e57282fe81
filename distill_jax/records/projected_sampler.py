"""Records of a teacher in the tokens of a student with another tokenizer, on the device.

`summarise` is `sampler.summarise` for projected distributions. With a vocabulary that is sharded
over mesh axes, each device computes the logits of its rows of the head for all positions of a
chunk; an all-to-all then gives it the whole distributions of its share of the positions, which it
projects and reduces. So no device holds more than its share of [chunk, vocabulary].
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from distill_jax.cross_tokenizer import dense
from distill_jax.cross_tokenizer.dense_targets import ProjectedTargets, levels_first, links_of
from distill_jax.nn import chunks, fused_head, mesh_in_use, sharding
from distill_jax.nn.sharding import MeshAxes
from distill_jax.records import sampler
from distill_jax.records.sampler import SamplerSpec

# Fields of dense.Projected in the result of `summarise`, and their names in Statistics.
STATISTICS = {
  "hard_BT": "hard_targets",
  "lost_BT": "lost_mass",
  "unresolved_BT": "unresolved_mass",
  "opened_BT": "opened_mass",
  "beyond_BT": "beyond_mass",
}


def summarise(
  targets: ProjectedTargets,
  u_BT: jax.Array,
  spec: SamplerSpec,
  *,
  chunk: int,
  batch_axes: tuple[str, ...] = sharding.BATCH,
  seq_axis: str | None = None,
  vocab_axis: MeshAxes = sharding.VOCAB,
) -> dict[str, jax.Array]:
  """Returns the targets of a teacher's outputs in the student's tokens.

  Args:
    targets: The teacher's outputs.
    u_BT: float32 offsets in [0, 1).
    spec: The targets to compute; its temperature is 1.
    chunk: See `sampler.summarise`, as for the other arguments.
    batch_axes: See `sampler.summarise`.
    seq_axis: See `sampler.summarise`.
    vocab_axis: See `sampler.summarise`.

  Returns:
    See `sampler.summarise`. Further STATISTICS [B, T]; see dense.Projected.
  """
  spec = spec.check(len(targets.head_VD.tables.length_S), with_offsets=True)
  scan = functools.partial(
    _scan, spec=spec, chunk=chunk, soft_cap=targets.soft_cap, min_mass=targets.min_mass
  )
  by_position = (targets.hidden_BTD, targets.links_BTLF, targets.labels_BT, u_BT)
  head = targets.head_VD
  if mesh_in_use.no_mesh():
    return scan(by_position, head.rows_VD, head.tables)
  mesh_in_use.divide(targets.labels_BT.shape[0], batch_axes, "batch_axes", "The batch")
  mesh_in_use.divide(targets.labels_BT.shape[1], seq_axis, "seq_axis", "The sequence")
  mesh_in_use.divide(len(head.rows_VD), vocab_axis, "vocab_axis", "The head")
  positions = PartitionSpec(batch_axes, seq_axis)
  return jax.shard_map(
    functools.partial(scan, axis=vocab_axis),
    in_specs=(positions, PartitionSpec(vocab_axis), PartitionSpec()),
    out_specs=positions,
    check_vma=False,
  )(by_position, head.rows_VD, head.tables)


def _scan(
  by_position: tuple[jax.Array, ...],
  head_VD: jax.Array,
  tables: dense.DenseTables,
  spec: SamplerSpec,
  chunk: int,
  soft_cap: float | None,
  min_mass: float,
  axis: MeshAxes = None,
) -> dict[str, jax.Array]:
  """Returns the output of `summarise` for one device's positions and rows of the head."""
  is_token_V = jnp.arange(len(head_VD) * _shards(axis)) < len(tables.order_V)

  def logits(hidden_XD: jax.Array) -> jax.Array:
    hidden_1XD = _all(hidden_XD[None].astype(head_VD.dtype), axis)
    z_XV = fused_head.soft_cap(fused_head.logits(hidden_1XD, head_VD), soft_cap)[0]
    if axis is not None:
      z_XV = jax.lax.all_to_all(z_XV, axis, 0, 1, tiled=True)
    return jnp.where(is_token_V[None], z_XV, -jnp.inf)

  def of_chunk(carry: None, xs: tuple[jax.Array, ...]) -> tuple[None, dict[str, jax.Array]]:
    hidden_BCD, links_BCLF, labels_BC, u_BC = xs
    B, C, L = links_BCLF.shape[:3]
    own = functools.partial(jax.tree.map, lambda x: _own(_padded(x, axis), axis))
    hidden_LXD = levels_first(hidden_BCD.reshape(B, C, L, -1))
    flat = (hidden_LXD, links_of(links_BCLF), labels_BC.reshape(1, -1), u_BC.reshape(1, -1))
    hidden_LXD, links_LX, labels_1X, u_1X = own(flat)
    p = dense.project(logits, hidden_LXD, links_LX, labels_1X[0], tables, min_mass)
    p_XS = p.p_XS
    if spec.kind == "dense":  # all tokens are outcomes, also those that nothing leads to
      p_XS = jnp.maximum(p_XS, dense.SMALLEST)
    out = sampler.of_shard(jnp.log(p_XS)[None], labels_1X, u_1X, spec)
    out |= {name: x[None] for name, x in zip(STATISTICS, p[1:], strict=True)}
    return carry, jax.tree.map(lambda x: _all(x, axis)[:, : B * C].reshape(B, C, *x.shape[2:]), out)

  xs = jax.tree.map(lambda x: chunks.split(x, chunk), by_position)
  _, out = jax.lax.scan(of_chunk, None, xs)
  return jax.tree.map(lambda x: chunks.join(x, by_position[0].shape[1]), out)


def _shards(axis: MeshAxes) -> Any:
  return 1 if axis is None else jax.lax.axis_size(axis)


def _padded(x: jax.Array, axis: MeshAxes) -> jax.Array:
  """Pads axis 1, the positions, to a multiple of the number of shards."""
  pad = ((0, 0), (0, -x.shape[1] % _shards(axis)), *((0, 0),) * (x.ndim - 2))
  return jnp.pad(x, pad)


def _own(x: jax.Array, axis: MeshAxes) -> jax.Array:
  """Returns this shard's share of the positions."""
  if axis is None:
    return x
  size = x.shape[1] // _shards(axis)
  return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * size, size, 1)


def _all(x: jax.Array, axis: MeshAxes) -> jax.Array:
  """Returns the positions of all shards."""
  return x if axis is None else jax.lax.all_gather(x, axis, axis=1, tiled=True)
