"""Predicts whether a run fits on a TPU slice, its speed and its cost.

A TPU is not needed. The program that `train` or `record` would run is compiled on this machine, by
libtpu, for the given TPU topology. Memory sizes are those that the compiler reports. Collectives
are counted in the compiled program. FLOPs are computed by formulas, since XLA counts the body of a
loop only once. Times are lower bounds: the maximum of the times for compute, memory and networks at
their published peaks. For `generate`, memory and times are computed by formula, and nothing is
compiled.

Reads: the config and the shapes of its models. Weights are read neither from disk nor from the
network if the config names shapes (teacher.shape, student.shape).

Writes: nothing but standard output. No --workdir is needed.

Config: mesh, teacher, student, data, records, losses, optim, train, generate, preflight.

Example:
  distill-jax preflight --config=configs/r1_qwen_7b.py --topology=v5p:4x4x4
"""

from __future__ import annotations

from distill_jax.config import Config
from distill_jax.errors import bad_value
from distill_jax.preflight import (
  collectives,
  compiler,
  decoding,
  decoding_table,
  estimate,
  flops,
  programs,
  roofline,
  slices,
  table,
  topology,
)
from distill_jax.types import JsonObject

VERBS = ("train", "record", "generate")


def run(config: Config) -> JsonObject:
  """Compiles one step and returns its memory, FLOPs, collectives and bounds on time.

  Returns:
    For `generate`, the result of decoding.estimate. For `train` and `record`, a dictionary with
    `fits`, `chips`, `peak_bytes_per_device`, `hbm_bytes_per_device`, `flops_per_step`,
    `collective_bytes_per_device`, `step_seconds_bound`, `mfu_bound`, `tokens_per_second_bound`,
    `chip_hours` (with evaluation), `evaluation_share` and others; preflight/table.py prints them.
    None stands for unknown numbers: the collectives of a program that does not fit, the hours for a
    corpus whose length the config does not contain and, with `tasks`, all numbers from the formulas
    for decoders.

  Raises:
    InputError: libtpu is not installed, the topology is unknown, or the config is not valid, or not
      valid on this topology.
  """
  options, verb = config.preflight, config.preflight.verb
  if verb not in VERBS:
    raise bad_value("--verb", verb, " or ".join(map(repr, VERBS)), "Choose one of them")
  hardware = topology.Hardware(options.topology, options.num_slices)
  topology.prepare()
  config = programs.without_weights(config)
  axes = config.mesh.whole_rows() if verb == "generate" else config.mesh
  mesh = topology.make_mesh(axes, options.topology, options.num_slices)
  price = {"dollars_per_chip_hour": options.dollars_per_chip_hour}
  if verb == "generate":
    return decoding.estimate(config, hardware, mesh) | price
  program = programs.lower(config, verb, mesh)
  memory, compiled = compiler.compile_step(program)
  fits = compiled is not None and memory.peak <= hardware.chip.hbm
  step_flops = None if config.tasks else flops.step_flops(config, verb, program.rows)
  result: JsonObject = {
    "fits": fits,
    **price,
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
  result["evaluation_share"] = estimate.evaluation_share(config, verb)
  result["smallest"] = slices.smallest_slice(config, verb, hardware, fits)
  return result


def text(r: JsonObject) -> str:
  """Formats the result of `run` for the terminal."""
  return decoding_table.text(r) if r["verb"] == "generate" else table.text(r)
