"""`preflight`: will it fit, how fast can it be, what will it cost; no accelerator is needed.

The very program that `train` or `record` would run is compiled for a named TPU topology by
libtpu, on this machine. Memory is what the compiler says. Collectives are counted in the
compiled program (preflight/collectives.py), FLOPs by closed formulas (preflight/flops.py), since
XLA's own count takes a loop's body once. Times are bounds: the largest of compute, memory and
networks, each at its published peak (preflight/chips.py).
"""

from __future__ import annotations

from distill_jax.config import Config
from distill_jax.errors import InputError
from distill_jax.preflight import (
  collectives,
  compiler,
  estimate,
  flops,
  programs,
  roofline,
  slices,
  topology,
)
from distill_jax.preflight.table import text  # noqa: F401
from distill_jax.types import JsonObject

VERBS = ("train", "record")


def run(config: Config) -> JsonObject:
  """Compiles one step and reports on it.

  Returns: see preflight/table.py for the words; the keys are `fits`, `chips`,
  `peak_bytes_per_device`, `hbm_bytes_per_device`, `flops_per_step`,
  `collective_bytes_per_device`, `step_seconds_bound`, `mfu_bound`, `tokens_per_second_bound`,
  `chip_hours` and more. What is not known (collectives of a program that does not fit, hours of
  a corpus whose length the config does not name) is None; of tasks, all that is counted by a
  decoder's formulas.

  Raises:
    InputError: libtpu is not installed, the topology is unknown, or the config does not fit
      together or onto it.
  """
  options, verb = config.preflight, config.preflight.verb
  if verb not in VERBS:
    raise InputError(f"--verb is {verb!r}; preflight compiles {' or '.join(VERBS)}")
  hardware = topology.Hardware(options.topology, options.num_slices)
  topology.prepare()
  config = programs.without_weights(config)
  mesh = topology.make_mesh(config.mesh, options.topology, options.num_slices)
  program = programs.lower(config, verb, mesh)
  memory, compiled = compiler.compile_step(program)
  fits = compiled is not None and memory.peak <= hardware.chip.hbm
  step_flops = None if config.tasks else flops.step_flops(config, verb, program.rows)
  result: JsonObject = {
    "fits": fits,
    "verb": verb,
    "topology": options.topology,
    "slices": options.num_slices,
    "chips": hardware.num_chips,
    "devices": mesh.size,
    "mesh": dict(mesh.shape),
    "peak_bytes_per_device": memory.peak,
    "hbm_bytes_per_device": hardware.chip.hbm,
    "bytes_per_device": {
      **program.arguments,
      "outputs": memory.outputs,
      "temporaries": memory.temporaries,
    },
    "flops_per_step": None if step_flops is None else flops.model_flops(step_flops),
    "flops": step_flops,
    "collectives": None,
    "collective_bytes_per_device": None,
    **dict.fromkeys(roofline.SPEED_KEYS),
  }
  if compiled is not None:
    sent = collectives.HloText(compiled.as_text(), options.num_slices).sent()
    result |= {"collectives": sent, "collective_bytes_per_device": sum(sent.values())}
    if step_flops is not None:
      moved = memory.arguments + compiled.memory_analysis().output_size_in_bytes
      result |= roofline.speed(config, verb, hardware, mesh, step_flops, moved, sent)
  result |= estimate.store_size(config, verb)
  result["smallest"] = slices.smallest_slice(config, verb, hardware, fits)
  return result
