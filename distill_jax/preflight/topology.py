"""Meshes of TPUs that are not available here, and the settings with which libtpu compiles."""

from __future__ import annotations

import dataclasses
import functools
import os

import jax
import numpy as np
from jax.experimental import topologies

from distill_jax.errors import bad_value
from distill_jax.nn import sharding
from distill_jax.nn.sharding import MeshOptions
from distill_jax.preflight import chips
from distill_jax.preflight.chips import Chip
from distill_jax.runtime import extras

# libtpu does not query a metadata server, does not log to the terminal, and can be loaded by
# several processes. It reads these variables when it is loaded, at the first topology.
ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_MIN_LOG_LEVEL": "3",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}


@dataclasses.dataclass(frozen=True)
class Hardware:
  """Slices of a listed topology (see chips.parse).

  Raises:
    InputError: The chip is unknown, or it does not have this slice.
  """

  topology: str  # e.g. v5p:4x4x4
  num_slices: int = 1

  def __post_init__(self) -> None:
    chips.parse(self.topology)

  @property
  def chip(self) -> Chip:
    return chips.parse(self.topology).chip

  @property
  def num_chips(self) -> int:
    """Number of chips in all slices."""
    return chips.parse(self.topology).chips * self.num_slices


def prepare() -> None:
  """Configures this process: computations run on the CPU, and TPU programs are not cached.

  Raises:
    InputError: libtpu is not installed.
  """
  if extras.not_installed("libtpu"):
    raise extras.missing("libtpu", "tpu")
  os.environ.update(ENVIRONMENT)
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_compilation_cache", False)


@functools.cache
def devices(topology: str, num_slices: int = 1) -> tuple[jax.Device, ...]:
  """Returns the devices of all slices of a listed topology (see chips.parse), in jax's order."""
  kwargs = {"num_slices": num_slices} if num_slices > 1 else {}
  described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **kwargs)
  return tuple(described.devices)


def make_mesh(config: MeshOptions, topology: str, num_slices: int = 1) -> jax.sharding.Mesh:
  """Returns the mesh that a run on these slices would have.

  Raises:
    InputError: The topology is not listed, or its devices cannot be divided by the config's mesh.
  """
  chips.parse(topology)
  if not 1 <= num_slices <= 64:
    raise bad_value("--num_slices", num_slices, "a number from 1 to 64", "Change it")
  described = devices(topology, num_slices)
  if any(d.core_on_chip for d in described) and topology.startswith("v4:"):
    # A v4 chip is one device, but libtpu describes its two cores, which mesh_utils cannot place.
    shape = sharding.mesh_shape(**vars(config), devices=len(described))
    axes = {"axis_types": (jax.sharding.AxisType.Auto,) * len(sharding.MESH_AXES)}
    return jax.sharding.Mesh(np.reshape(described, shape), sharding.MESH_AXES, **axes)
  return config.make(described)
