"""The mesh that `jax.set_mesh` has set, as code under it sees it, and checks of its axes.

Mesh axis names are parameters of the fused head and of the sampler, so that both work on meshes of
other libraries.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from distill_jax.errors import InputError, bad_value
from distill_jax.nn.sharding import MeshAxes, mesh_axis_names
from distill_jax.types import PyTree


def no_mesh() -> bool:
  """Returns True if no mesh is in use.

  Raises:
    InputError: A mesh is set by `with mesh:` only.
  """
  if not jax.sharding.get_abstract_mesh().empty:
    return False
  if (found := _size_of_mesh_context()) > 1:
    raise InputError(
      f"A mesh of {found} devices is set by `with mesh:`, which traced code does not see. Use "
      "`with jax.set_mesh(mesh):` instead."
    )
  return True


def spread(axes: MeshAxes, argument: str) -> int:
  """Returns the number of devices of the mesh in use over which these axes spread an array.

  It is 1 without a mesh.

  Args:
    axes: Names of mesh axes.
    argument: Name of the argument that holds them, for errors.

  Raises:
    InputError: The mesh lacks one of the axes, or is set by `with mesh:` only.
  """
  if no_mesh():
    return 1
  mesh, names = jax.sharding.get_abstract_mesh(), mesh_axis_names(axes)
  if missing := [axis for axis in names if axis not in mesh.shape]:
    raise bad_value(
      argument,
      axes,
      f"axes of the mesh, which are {mesh.axis_names} and lack {missing[0]!r}",
      f"Pass {argument} with names of the mesh",
    )
  return math.prod(mesh.shape[axis] for axis in names)


def divide(size: int, axes: MeshAxes, argument: str, name: str) -> None:
  """Raises InputError if an array axis does not divide over the devices of its mesh axes.

  Args:
    size: Size of the array axis.
    axes: Names of mesh axes.
    argument: Name of the argument that holds them, for errors.
    name: Name of the array axis, for errors.
  """
  if size % (ways := spread(axes, argument)):
    raise InputError(
      f"{name} has size {size}, and {argument} {axes!r} spreads it over {ways} devices. Take a "
      f"multiple of {ways}, or other axes."
    )


def auto(fn: Callable[..., PyTree], out_sharding: PartitionSpec) -> Callable[..., PyTree]:
  """Returns the function as it runs on a mesh with Explicit axes too.

  Args:
    fn: A function that is written for Auto axes. It must not close over arrays.
    out_sharding: How all its results are sharded.
  """
  if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
    return fn

  def of_arrays(*args: PyTree) -> PyTree:
    return jax.sharding.auto_axes(fn, out_sharding=out_sharding)(*jax.tree.map(jnp.asarray, args))

  return of_arrays


def manual_axes() -> tuple[str, ...]:
  """Returns the mesh axes that `jax.shard_map` has made manual around this code."""
  mesh = jax.sharding.get_abstract_mesh()
  kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
  return tuple(name for name, kind in kinds if kind == AxisType.Manual)


def _size_of_mesh_context() -> int:
  """Returns the number of devices of the mesh that `with mesh:` has set; 1 without one."""
  from jax._src import mesh as mesh_lib  # jit hides it from public functions

  resources = getattr(mesh_lib, "thread_resources", None)
  mesh = getattr(getattr(resources, "env", None), "physical_mesh", None)
  return 1 if mesh is None or mesh.empty else mesh.size


def check_axis_types(batch_axes: tuple[str, ...]) -> None:
  """Raises InputError on a mesh whose axes are not left to the partitioner."""
  mesh = jax.sharding.get_abstract_mesh()
  if manual := set(batch_axes) & set(manual_axes()):
    raise bad_value(
      "batch_axes",
      batch_axes,
      f"axes over which jax.shard_map does not map already, as over {sorted(manual)}",
      "Pass batch_axes=() and sum over the devices yourself, or call it outside of shard_map",
    )
  if AxisType.Explicit in mesh.axis_types:
    raise InputError(
      f"The mesh has Explicit axes {mesh.axis_names}; fused_head works on Auto axes. Call "
      "distill_jax.fused_loss, which accepts both, or make the mesh with axis_types=AxisType.Auto."
    )
