"""Compiles a step of `train` or `record`, and returns its memory, operations and bounds on time."""

from __future__ import annotations

import jax

from distill_jax.config import Config
from distill_jax.preflight import collectives, compiler, flops, roofline
from distill_jax.preflight.programs import LoweredStep
from distill_jax.preflight.topology import Hardware
from distill_jax.types import JsonObject


def estimate(
  config: Config,
  verb: str,
  program: LoweredStep,
  hardware: Hardware,
  mesh: jax.sharding.Mesh,
  operations: dict[str, float] | None = None,
) -> JsonObject:
  """Compiles one step, and returns its part of the result of `preflight`.

  Args:
    config: The config of the run.
    verb: "train" or "record".
    program: The step, from programs.lower.
    hardware: The slices.
    mesh: The devices.
    operations: The operations of the step by purpose; None for those of the config.

  Returns:
    A dict with `fits`, `peak_bytes_per_device`, `hbm_bytes_per_device`, `bytes_per_device`,
    `flops_per_step`, `flops`, `collectives`, `collective_bytes_per_device` and roofline.SPEED_KEYS.
    None stands for unknown numbers: the collectives of a program that does not fit and, with
    `tasks`, all numbers from the formulas for decoders.
  """
  memory, compiled = compiler.compile_step(program)
  step_flops = operations
  if operations is None and not config.tasks:
    step_flops = flops.step_flops(config, verb, program.rows)
  result: JsonObject = {
    "fits": compiled is not None and memory.peak <= hardware.chip.hbm,
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
    sent = collectives.HloText(compiled.as_text(), hardware.num_slices).sent()
    result |= {"collectives": sent, "collective_bytes_per_device": sum(sent.values())}
    if step_flops is not None:
      moved = memory.arguments + compiled.memory_analysis().output_size_in_bytes
      result |= roofline.speed(config, verb, hardware, mesh, step_flops, moved, sent)
  return result
