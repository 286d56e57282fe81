"""The rows of an embedding table, and the gradient of the table."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from distill_jax.nn.sharding import Rules, mesh_axis_names, on_one_device


def lookup(
  table_VD: jax.Array, tokens_BT: jax.Array, axes: tuple[str, ...], rules: Rules
) -> jax.Array:
  """Returns the rows of tokens in an embedding table, [B, T, D].

  The gradient of the table is summed in float32: in bfloat16 that of a frequent token would stop
  growing at 256 terms. On a mesh, a device sums the columns that it stores, also of the positions
  of the devices that store other columns: gradients of positions are sent, which are smaller than
  the table.

  Args:
    table_VD: the table, with the sharding of the compute column.
    tokens_BT: int32.
    axes: the logical axes of the table.
    rules: the rules of the model.
  """

  @jax.custom_vjp
  def rows(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    return table_VD[tokens_BT]

  def backward(tokens_BT: jax.Array, grad_BTD: jax.Array) -> tuple[jax.Array, None]:
    zero_VD, dtype = jnp.zeros(shape, jnp.float32), grad_BTD.dtype
    if on_one_device():
      return zero_VD.at[tokens_BT].add(grad_BTD.astype(jnp.float32)).astype(dtype), None
    stored = rules.spec(axes, "storage")
    columns = mesh_axis_names(stored[1])
    positions = list(rules.spec(("batch", "seq"), "compute"))
    constrain = jax.lax.with_sharding_constraint
    # One mesh axis at a time: XLA makes an all-to-all of that, but an all-gather of several.
    for i, moved in enumerate(columns):
      positions = [tuple(a for a in mesh_axis_names(entry) if a != moved) for entry in positions]
      grad_BTD = constrain(grad_BTD, PartitionSpec(*positions, columns[: i + 1]))
    tokens_BT = constrain(tokens_BT, PartitionSpec(*positions))
    grad_VD = constrain(zero_VD, stored).at[tokens_BT].add(grad_BTD.astype(jnp.float32))
    return constrain(grad_VD, stored).astype(dtype), None

  shape = table_VD.shape
  rows.defvjp(lambda table_VD, tokens_BT: (rows(table_VD, tokens_BT), tokens_BT), backward)
  return rows(table_VD, tokens_BT)
