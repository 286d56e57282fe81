"""The search for the smallest slice of a chip on which a config fits."""

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
  """Finds the smallest listed slice of the chip on which the config fits, other than `hardware`.

  The mesh is the config's, or where that does not divide a slice, all of it is fsdp (beside
  tensor). Slices that cannot hold the arguments are passed over by arithmetic; the others are
  compiled, in order of size, with little effort.

  Args:
    fits: whether the config fits on `hardware`: smaller slices are searched if so, larger if not.

  Returns: `topology` and `mesh`; `proven`, whether a compile showed that it fits; then
    `peak_bytes_per_device`, or `tried`, how many were compiled in vain. None if no slice fits.
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
    except InputError:  # a dimension or the batch does not divide over it
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
  """The config's mesh on these slices, or one of fsdp; None if its tensor does not divide them."""
  all_fsdp = dataclasses.replace(config.mesh, data=hardware.num_slices, fsdp=-1)
  for axes in (config.mesh, all_fsdp):
    try:
      return topology.make_mesh(axes, hardware.topology, hardware.num_slices)
    except InputError:
      continue
  return None
