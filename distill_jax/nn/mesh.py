"""The device mesh: its axes, and the order of devices on it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from distill_jax.errors import bad_value

MESH_AXES = ("data", "fsdp", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshOptions:
  """The device mesh: the number of devices on each axis."""

  data: int = 1
  """Devices on the data axis: sequences are split, parameters are copied. -1: all remaining
  devices. Only this axis may span several slices."""
  fsdp: int = -1
  """Devices on the FSDP axis: sequences and stored parameters are split. -1: all remaining
  devices."""
  tensor: int = 1
  """Devices on the tensor axis: heads, feed-forward channels, experts and the vocabulary are split.
  -1: all remaining devices."""
  context: int = 1
  """Devices on the context axis: the positions of each sequence, and stored parameters, are split.
  `train` and `record` of text, and `evaluate` without benchmarks, can use it; for other verbs its
  devices join the FSDP axis. -1: all remaining devices."""

  def whole_rows(self) -> MeshOptions:
    """Returns the mesh for work on whole sequences: the devices of `context` join `fsdp`."""
    fsdp = -1 if -1 in (self.fsdp, self.context) else self.fsdp * self.context
    return dataclasses.replace(self, fsdp=fsdp, context=1)

  def make(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of these devices, or of all devices of jax; see `make_mesh`."""
    return make_mesh(**vars(self), devices=devices)


def make_mesh(
  data: int = 1,
  fsdp: int = -1,
  tensor: int = 1,
  context: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Returns a mesh with axes (data, fsdp, context, tensor).

  With TPUs in several slices, only the data axis crosses the slow network between slices. Other
  devices are in the order of their processes, and any axis may cross processes: the slice_index of
  a GPU is the number of its node or of its NVLink domain.

  Args:
    data: the size of the data axis. One of the sizes may be -1, for all remaining devices.
    fsdp: the size of the fsdp axis.
    tensor: the size of the tensor axis.
    context: the size of the context axis.
    devices: the devices; None for all devices of jax.

  Raises:
    InputError: the sizes do not fit the number of devices or slices.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = mesh_shape(data, fsdp, tensor, context, len(devices))
  auto = (AxisType.Auto,) * len(MESH_AXES)
  if devices[0].platform != "tpu":
    grid = np.array(sorted(devices, key=lambda d: (d.process_index, d.id))).reshape(shape)
    return Mesh(grid, MESH_AXES, axis_types=auto)
  slices = len({getattr(d, "slice_index", None) for d in devices})
  if shape[0] % slices:
    expected = f"a multiple of {slices}, the number of slices, which only this axis spans"
    raise bad_value("mesh.data", shape[0], expected, "Change mesh.data")
  split = {"allow_split_physical_axes": True}
  if slices == 1:
    grid = mesh_utils.create_device_mesh(shape, devices, **split)
  else:
    within = (shape[0] // slices, *shape[1:])
    grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1, 1), devices, **split)
  return Mesh(grid, MESH_AXES, axis_types=auto)


def mesh_shape(
  data: int, fsdp: int, tensor: int, context: int, devices: int
) -> tuple[int, int, int, int]:
  """Returns the sizes of MESH_AXES for a number of devices, with a -1 resolved.

  Raises:
    InputError: the sizes do not fit the number of devices.
  """
  shape = [data, fsdp, context, tensor]
  if shape.count(-1) > 1 or any(n == 0 or n < -1 for n in shape):
    expected = "positive sizes, of which one may be -1 (all remaining devices)"
    raise bad_value("mesh", dict(zip(MESH_AXES, shape, strict=True)), expected, "Change the sizes")
  if -1 in shape:
    known = -math.prod(shape)
    if devices % known:
      sizes = dict(zip(MESH_AXES, shape, strict=True))
      raise bad_value("mesh", sizes, f"sizes that divide {devices} devices", "Change the sizes")
    shape[shape.index(-1)] = devices // known
  if math.prod(shape) != devices:
    sizes = dict(zip(MESH_AXES, shape, strict=True))
    expected = f"sizes whose product is {devices}, the number of devices"
    raise bad_value("mesh", sizes, expected, "Set mesh.fsdp=-1 to use all devices")
  data, fsdp, context, tensor = shape
  return data, fsdp, context, tensor
