"""The inputs of the head, divided among devices and into chunks of positions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from distill_jax.nn import chunks, mesh_in_use
from distill_jax.nn.sharding import MeshAxes, mesh_axis_names
from distill_jax.types import Batch, PyTree

SumOverBatch = Callable[[PyTree], PyTree]  # sums a tree over the devices with other positions


def position_axes(batch_axes: tuple[str, ...], seq_axis: str | None) -> tuple[str, ...]:
  """Returns the mesh axes over which the positions of a batch are sharded."""
  return (*batch_axes, *mesh_axis_names(seq_axis))


def per_shard(
  scan: Callable[..., PyTree],
  out_specs: PyTree,
  batch_axes: tuple[str, ...],
  seq_axis: str | None,
  hidden_BTD: jax.Array,
  head_VD: jax.Array,
  batch: Batch,
) -> PyTree:
  """Runs `scan(hidden, head, batch, sum_over_batch)` on each device's own positions.

  Without this, the partitioner would sum the head's gradient over devices after every chunk. The
  vocabulary is still sharded by the partitioner.
  """
  batch = batch.replace(inputs=None, valid_BS=None)  # unused by the head
  axes = position_axes(batch_axes, seq_axis)
  mesh_in_use.check_axis_types(axes)
  if mesh_in_use.spread(batch_axes, "batch_axes") * mesh_in_use.spread(seq_axis, "seq_axis") == 1:
    return scan(hidden_BTD, head_VD, batch, lambda tree: tree)
  mesh_in_use.divide(hidden_BTD.shape[0], batch_axes, "batch_axes", "The batch")
  mesh_in_use.divide(hidden_BTD.shape[1], seq_axis, "seq_axis", "The sequence")
  positions = P(batch_axes, seq_axis)
  specs = jax.tree.map(lambda _: positions, batch)
  for name, t in batch.targets.items():
    if t.head_VD is not None:  # not sharded over these axes, like the student's head
      specs.targets[name] = specs.targets[name].replace(head_VD=P())
  return jax.shard_map(
    functools.partial(scan, sum_over_batch=lambda tree: jax.lax.psum(tree, axes)),
    in_specs=(positions, P(), specs),
    out_specs=out_specs,
    axis_names=set(axes),
    check_vma=False,
  )(hidden_BTD, head_VD, batch)


def sum_parts(
  parts_sVD: jax.Array,
  batch_axes: tuple[str, ...],
  seq_axis: str | None,
  vocab_axis: MeshAxes,
  embed_axis: MeshAxes,
) -> jax.Array:
  """Sums the parts of the head's gradient that devices with other positions have computed.

  The sum is reduce-scattered, so that a device computes the columns that it stores.

  Args:
    parts_sVD: the parts of s devices, from `per_shard` with the axes of positions as out_specs.
    batch_axes: see fused_head.loss, as for the other arguments.

  Returns:
    The gradient [V, D].
  """
  if len(parts_sVD) == 1:
    return parts_sVD[0]
  _, V, D = parts_sVD.shape
  axes = position_axes(batch_axes, seq_axis)
  columns = tuple(axis for axis in mesh_axis_names(embed_axis) if axis in axes)
  if D % mesh_in_use.spread(columns, "embed_axis"):  # e.g. a head with a bias as its last column
    columns = ()
  # The rows are Manual too: the partitioner would gather them for a reduce-scatter.
  rows = tuple(axis for axis in mesh_axis_names(vocab_axis) if axis not in axes)
  if V % mesh_in_use.spread(rows, "vocab_axis"):
    rows = ()

  def on_device(part_1VD: jax.Array) -> jax.Array:
    part_VD = part_1VD[0]
    if columns:
      part_VD = jax.lax.psum_scatter(part_VD, columns, scatter_dimension=1, tiled=True)
    others = tuple(a for a in axes if a not in columns and mesh_in_use.spread(a, "batch_axes") > 1)
    return jax.lax.psum(part_VD, others)

  return jax.shard_map(
    on_device,
    in_specs=P(axes, rows),
    out_specs=P(rows, columns),
    axis_names={*axes, *rows},
    check_vma=False,
  )(parts_sVD)


class HeadChunks(NamedTuple):
  """The inputs of the scan: arrays with the n chunks as their first axis."""

  hidden_nBCD: jax.Array
  batch: Batch  # its arrays are [n, B, C, ...]
  teacher_heads: dict[str, jax.Array | None]  # have no position axis and belong to every chunk

  def with_logits(self, piece: Batch) -> Batch:
    """Returns one chunk of the batch with the logits of online teachers."""
    heads = self.teacher_heads
    targets = {n: t.replace(head_VD=heads[n]).with_logits() for n, t in piece.targets.items()}
    return piece.replace(targets=targets)


def split(hidden_BTD: jax.Array, batch: Batch, chunk: int) -> HeadChunks:
  """Splits hidden states and batch into chunks of positions.

  Masked positions are set to zero here, since `0 * NaN` is NaN in the gradient of the head. The
  last chunk is padded with masked positions.
  """

  def cut(x_BT):
    mask = batch.mask_BT.reshape(batch.mask_BT.shape + (1,) * (x_BT.ndim - 2))
    return chunks.split(jnp.where(mask, x_BT, jnp.zeros((), x_BT.dtype)), chunk)

  # Arrays without a position axis are not scanned over; `with_logits` adds them to every chunk.
  heads = {name: t.head_VD for name, t in batch.targets.items()}
  targets = {n: t.replace(head_VD=None, taps_BPTD=None) for n, t in batch.targets.items()}
  batch_nBC = jax.tree.map(cut, batch.replace(inputs=None, targets=targets))
  return HeadChunks(cut(hidden_BTD), batch_nBC, heads)
