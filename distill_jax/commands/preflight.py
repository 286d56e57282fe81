"""`preflight`: will it fit, how fast can it be, what will it cost; no accelerator is needed.

The very program that `train` or `record` would run is compiled for a named TPU topology by
libtpu, on this machine. Memory is what the compiler says. Collectives are counted in the
compiled program (collectives.py), FLOPs by closed formulas (flops.py), since XLA's own count
takes a loop's body once. Times are bounds: the largest of compute, memory and networks, each at
its published peak (chips.py).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from jax.errors import JaxRuntimeError

from distill_jax.config import Config
from distill_jax.errors import InputError
from distill_jax.preflight import chips, collectives, estimate, flops, programs, topology
from distill_jax.preflight.report import text  # noqa: F401

VERBS = ("train", "record")
QUICK = {"exec_time_optimization_effort": -1.0}  # 4 to 6 times cheaper, peak within 5%
TRIES = 3  # compiles in search of the smallest slice


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes a device: the peak, and what it is made of.

  Of a program that does not fit, libtpu gives the whole alone. It says "HLO temporaries" and
  means arguments and outputs too, as programs show that have none. Of one that fits, its
  `temp_size_in_bytes` is more than ever lives at a time: it alone passes the peak of large
  programs, and with the arguments the memory of chips for which they compile.
  """

  arguments: int
  outputs: int  # beside those that take the place of arguments
  temporaries: int  # what else lives at the peak
  peak: int


def run(config: Config) -> dict[str, Any]:
  """Compiles one step and reports on it.

  Returns: see report.py for the words; the keys are `fits`, `chips`,
  `peak_bytes_per_device`, `hbm_bytes_per_device`, `flops_per_step`,
  `collective_bytes_per_device`, `step_seconds_bound`, `mfu_bound`, `tokens_per_second_bound`,
  `chip_hours` and more. What is not known (collectives of a program that does not fit, hours of
  a corpus whose length the config does not name) is None; of tasks, all that is counted by a
  decoder's formulas.

  Raises:
    InputError: libtpu is not installed, the topology is unknown, or the config does not fit
      together or onto it.
  """
  name, num_slices, verb = dataclasses.astuple(config.preflight)
  if verb not in VERBS:
    raise InputError(f"--verb is {verb!r}; preflight compiles {' or '.join(VERBS)}")
  chip, per_slice = chips.parse(name)
  topology.prepare()
  config = programs.without_weights(config)
  mesh = topology.mesh(config.mesh, name, num_slices)
  program = programs.of(config, verb, mesh)
  memory, compiled = compile_step(program)
  fits = compiled is not None and memory.peak <= chip.hbm
  ops = None if config.tasks else flops.step(config, verb, program.rows)
  out: dict[str, Any] = {
    "fits": fits,
    "verb": verb,
    "topology": name,
    "slices": num_slices,
    "chips": per_slice * num_slices,
    "devices": mesh.size,
    "mesh": dict(mesh.shape),
    "peak_bytes_per_device": memory.peak,
    "hbm_bytes_per_device": chip.hbm,
    "bytes_per_device": {
      **program.arguments,
      "outputs": memory.outputs,
      "temporaries": memory.temporaries,
    },
    "flops_per_step": ops and sum(n for what, n in ops.items() if what != "recomputed"),
    "flops": ops,
  }
  out |= _speed(config, verb, chip, mesh, out, compiled, memory)
  out |= dict.fromkeys(("store_bytes_per_token", "tokens", "store_bytes"))
  if not config.tasks:
    out["store_bytes_per_token"] = round(estimate.record_bytes(programs.manifest(config)), 1)
    total = estimate.tokens(config, verb)
    out["tokens"] = total or None
    # Of a corpus of unknown length no more is known than what training sees, perhaps twice.
    stored = estimate.tokens(config, "record") or total
    out["store_bytes"] = round(stored * out["store_bytes_per_token"]) if stored else None
  out["smallest"] = _smallest(config, verb, chip, per_slice, num_slices, fits)
  return out


def compile_step(program: programs.Program, options: Any = None) -> tuple[Memory, Any]:
  """(memory, the compiled step); None in its place where it does not fit."""
  given = sum(program.arguments.values())
  try:
    compiled = program.lowered.compile(compiler_options=options)
  except JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    size = r"([\d.]+)([KMG])"
    needs = re.search(rf"\({size}\) exceeds available HBM|Used {size} of \S+ hbm", str(e))
    if needs is None:
      raise
    number, unit = needs[1] or needs[3], needs[2] or needs[4]
    asked = int(float(number) * 2 ** {"K": 10, "M": 20, "G": 30}[unit])
    return Memory(given, 0, max(0, asked - given), asked), None
  m = compiled.memory_analysis()
  fresh = m.output_size_in_bytes - m.alias_size_in_bytes
  given, peak = m.argument_size_in_bytes, m.peak_memory_in_bytes
  return Memory(given, fresh, max(0, peak - given - fresh), peak), compiled


def _speed(
  config: Config,
  verb: str,
  chip: chips.Chip,
  mesh: Any,
  out: dict[str, Any],
  compiled: Any,
  memory: Memory,
) -> dict[str, Any]:
  """Collectives and bounds; None for all of a program that does not compile.

  None for the bounds where operations are not known.
  """
  names = (
    "collectives",
    "collective_bytes_per_device",
    "bounds",
    "bound_by",
    "step_seconds_bound",
    "mfu_bound",
    "tokens_per_second_bound",
    "chip_hours",
  )
  if compiled is None:
    return dict.fromkeys(names)
  sent = collectives.Program(compiled.as_text(), out["slices"]).sent()
  if out["flops"] is None:
    known = {"collectives": sent, "collective_bytes_per_device": sum(sent.values())}
    return dict.fromkeys(names) | known
  moved = memory.arguments + compiled.memory_analysis().output_size_in_bytes
  moved_bytes = estimate.hbm_bytes(config, verb, moved, mesh)
  bound = estimate.bound(chip, out["chips"], mesh.size, out["flops"], moved_bytes, sent)
  rows = config.records.batch_size if verb == "record" else config.train.batch_size
  rate = rows * config.data.seq_len / bound.seconds
  total = estimate.tokens(config, verb)
  mfu = out["flops_per_step"] / (bound.seconds * out["chips"] * chip.flops)
  hours = total / rate * out["chips"] / 3600 if total else None
  values = (
    sent,
    sum(sent.values()),
    vars(bound),
    bound.by,
    bound.seconds,
    mfu,
    rate,
    hours,
  )
  return dict(zip(names, values, strict=True))


def _smallest(
  config: Config, verb: str, chip: chips.Chip, per_slice: int, num_slices: int, fits: bool
) -> dict[str, Any] | None:
  """The smallest listed slice of this chip on which the config fits, beside the one asked for.

  The mesh is the config's, or where that does not divide a slice, all of it is fsdp (beside
  tensor). Slices that cannot hold the arguments are passed over by arithmetic; the others are
  compiled, in order of size, with little effort.
  """
  tried = 0
  for name in chip.topologies:
    _, n = chips.parse(name)
    if n == per_slice or (fits and n > per_slice) or (not fits and n < per_slice):
      continue
    mesh = _mesh(config, name, num_slices)
    try:
      if mesh is None or estimate.arguments(config, verb, mesh) > chip.hbm:
        continue
      program = programs.of(config, verb, mesh)
    except InputError:  # a dimension or the batch does not divide over it
      continue
    found = {"topology": name, "mesh": dict(mesh.shape)}
    if tried == TRIES:
      return found | {"proven": False, "tried": tried}
    tried += 1
    memory, compiled = compile_step(program, QUICK)
    if compiled is not None and memory.peak <= chip.hbm:
      return found | {"proven": True, "peak_bytes_per_device": memory.peak}
  return None


def _mesh(config: Config, name: str, num_slices: int) -> Any:
  """The config's mesh on these slices, or one of fsdp; None if its tensor does not divide them."""
  for axes in (config.mesh, dataclasses.replace(config.mesh, data=num_slices, fsdp=-1)):
    try:
      return topology.mesh(axes, name, num_slices)
    except InputError:
      continue
  return None
