"""The search for the smallest slice that a config fits on."""

from __future__ import annotations

import dataclasses

import jax

from distill_jax.config import Config
from distill_jax.errors import InputError
from distill_jax.preflight import compiler, estimate, programs, topology
from distill_jax.preflight.topology import Hardware
from distill_jax.types import JsonObject

MAX_COMPILES = 3


def smallest_slice(config: Config, verb: str, hardware: Hardware, fits: bool) -> JsonObject | None:
  """Finds the smallest listed slice of the chip that the config fits on, other than `hardware`.

  The mesh is that of the config. If a slice cannot be divided by it, all devices are fsdp, except
  for the tensor axis. Slices whose memory is smaller than the arguments are skipped without
  compiling. The others are compiled with low effort, in order of size.

  Args:
    config: the config of the run.
    verb: "train" or "record".
    hardware: the slice of the config.
    fits: whether the config fits on `hardware`. If it does, smaller slices are searched, otherwise
      larger ones.

  Returns:
    `topology` and `mesh`; `proven`, True if the step compiles for it; then `peak_bytes_per_device`
    or, if it is not proven, `tried`, the number of smaller slices that were compiled and do not
    fit. None if no slice fits.
  """
  tried = 0
  for name in hardware.chip.topologies:
    other = Hardware(name, hardware.num_slices)
    if fits == (other.num_chips > hardware.num_chips) or other.num_chips == hardware.num_chips:
      continue
    mesh = _mesh(config, other)
    try:
      if mesh is None or estimate.argument_bytes(config, verb, mesh) > hardware.chip.hbm:
        continue
      program = programs.lower(config, verb, mesh)
    except InputError:  # a dimension or the batch is not divisible
      continue
    slice_ = {"topology": name, "mesh": dict(mesh.shape)}
    if tried == MAX_COMPILES:
      return slice_ | {"proven": False, "tried": tried}
    tried += 1
    memory, compiled = compiler.compile_step(program, compiler.LOW_EFFORT)
    if compiled is not None and memory.peak <= hardware.chip.hbm:
      return slice_ | {"proven": True, "peak_bytes_per_device": memory.peak}
  return None


def _mesh(config: Config, hardware: Hardware) -> jax.sharding.Mesh | None:
  """Returns the config's mesh on these slices, else one with all devices in fsdp, else None."""
  all_fsdp = dataclasses.replace(config.mesh, data=hardware.num_slices, fsdp=-1)
  for axes in (config.mesh, all_fsdp):
    try:
      return topology.make_mesh(axes, hardware.topology, hardware.num_slices)
    except InputError:
      continue
  return None
