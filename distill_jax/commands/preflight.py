"""Predicts whether a run fits on a TPU slice, its speed and its cost.

A TPU is not needed. The program that `train` or `record` would run is compiled on this machine, by
libtpu, for the given TPU topology. Memory sizes are those that the compiler reports. Collectives
are counted in the compiled program. FLOPs are computed by formulas, since XLA counts the body of a
loop only once. Times are lower bounds: the maximum of the times for compute, memory and networks at
their published peaks. For `generate`, memory and times are computed by formula, and nothing is
compiled. For `on_policy`, the training step is compiled; generation and scoring are computed by
formula.

Reads: the config and the shapes of its models. Weights are read neither from disk nor from the
network if the config names shapes (teacher.shape, student.shape).

Writes: nothing but standard output. No --workdir is needed.

Config: mesh, teacher, student, data, records, losses, optim, train, generate, on_policy,
preflight.

Example:
  distill-jax preflight --config=configs/r1_qwen_7b.py --topology=v5p:4x4x4
"""

from __future__ import annotations

from distill_jax.config import Config
from distill_jax.errors import bad_value
from distill_jax.preflight import (
  decoding,
  decoding_table,
  estimate,
  programs,
  rounds,
  rounds_table,
  slices,
  step_estimate,
  table,
  topology,
)
from distill_jax.types import JsonObject

VERBS = ("train", "record", "generate", "on_policy")


def run(config: Config) -> JsonObject:
  """Compiles one step and returns its memory, FLOPs, collectives and bounds on time.

  Returns:
    The verb, the slices and the mesh and, for `generate`, the result of decoding.estimate; for
    `on_policy`, that of rounds.estimate_rounds; for `train` and `record`, `fits`,
    `peak_bytes_per_device`, `hbm_bytes_per_device`, `flops_per_step`,
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
  result: JsonObject = {
    "verb": verb,
    "dollars_per_chip_hour": options.dollars_per_chip_hour,
    "topology": options.topology,
    "slices": options.num_slices,
    "chips": hardware.num_chips,
    "devices": mesh.size,
    "mesh": dict(mesh.shape),
  }
  if verb == "generate":
    return result | decoding.estimate(config, hardware, mesh)
  if verb == "on_policy":
    return result | rounds.estimate_rounds(config, hardware, mesh)
  program = programs.lower(config, verb, mesh)
  step = step_estimate.estimate(config, verb, program, hardware, mesh)
  return {
    **result,
    **step,
    **estimate.store_size(config, verb),
    "evaluation_share": estimate.evaluation_share(config, verb),
    "smallest": slices.smallest_slice(config, verb, hardware, step["fits"]),
  }


def text(r: JsonObject) -> str:
  """Formats the result of `run` for the terminal."""
  return {"generate": decoding_table, "on_policy": rounds_table}.get(r["verb"], table).text(r)
