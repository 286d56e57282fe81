"""Compiles a step for the devices of a mesh and returns the memory that the compiler reports."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from jax.errors import JaxRuntimeError

from distill_jax.preflight.programs import LoweredStep

# Takes a third to a half of the CPU time of a full compile (tools/bench/compile.py); the peak of
# memory is within 6% of that of a full compile.
LOW_EFFORT: dict[str, str | int | float | bool] = {"exec_time_optimization_effort": -1.0}
_SIZE = r"([\d.]+)([KMG])"
_TOO_LARGE = re.compile(rf"\({_SIZE}\) exceeds available HBM|Used {_SIZE} of \S+ hbm")


@dataclasses.dataclass(frozen=True)
class Memory:
  """The peak memory of a program and its parts, in bytes per device.

  If a program does not fit, libtpu reports only the total. Its message calls the total "HLO
  temporaries", but it includes arguments and outputs. If a program fits, `temp_size_in_bytes` is
  not used, because it is larger than the memory in use at any time: for large programs it exceeds
  their peak and, together with the arguments, the memory of chips for which they compile.
  """

  arguments: int
  outputs: int  # without those that reuse the memory of arguments
  temporaries: int  # everything else in use at the peak
  peak: int


def compile_step(
  program: LoweredStep, options: dict[str, str | int | float | bool] | None = None
) -> tuple[Memory, Any]:
  """Returns the memory that a step needs, and the compiled step or None if it does not fit."""
  arguments = sum(program.arguments.values())
  try:
    compiled = program.lowered.compile(compiler_options=options)
  except JaxRuntimeError as e:
    peak = _bytes_needed(str(e))
    if peak is None:
      raise
    return Memory(arguments, 0, max(0, peak - arguments), peak), None
  m = compiled.memory_analysis()
  outputs = m.output_size_in_bytes - m.alias_size_in_bytes
  arguments, peak = m.argument_size_in_bytes, m.peak_memory_in_bytes
  return Memory(arguments, outputs, max(0, peak - arguments - outputs), peak), compiled


def _bytes_needed(message: str) -> int | None:
  """Returns the bytes per device in the error for a program that is too large, None for others."""
  match = _TOO_LARGE.search(message)
  if "RESOURCE_EXHAUSTED" not in message or match is None:
    return None
  number, unit = match[1] or match[3], match[2] or match[4]
  return int(float(number) * 2 ** {"K": 10, "M": 20, "G": 30}[unit])
