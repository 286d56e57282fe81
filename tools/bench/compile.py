"""Measures the CPU seconds in which this machine compiles a step for a TPU slice, by libtpu.

  python tools/bench/compile.py configs/r1_record.py --verb=record [--topology=v5p:4x4x4]

The program is that of `preflight`, which `train` or `record` compiles on the slice. `lower` is
tracing and lowering, `full` the compilation, and `low` that with low effort, with which `preflight`
searches for the smallest slice. CPU seconds are those of all threads. `operations` counts the
operations of the lowered program; their number does not depend on that of the layers where these
are scanned. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Callable
from typing import TypeVar

from distill_jax import cli
from distill_jax.preflight import compiler, programs, topology

T = TypeVar("T")


def timed(figures: dict[str, float], name: str, call: Callable[[], T]) -> T:
  """Returns the result of a call, and adds its CPU and wall seconds to `figures`."""
  cpu, wall = time.process_time(), time.perf_counter()
  result = call()
  figures[f"{name}_cpu_seconds"] = time.process_time() - cpu
  figures[f"{name}_wall_seconds"] = time.perf_counter() - wall
  return result


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("config")
  parser.add_argument("--verb", default="train")
  parser.add_argument("--topology", default="v5p:4x4x4")
  args = parser.parse_args()
  config = programs.without_weights(cli.parse(["compile", f"--config={args.config}"]))
  topology.prepare()
  mesh = topology.make_mesh(config.mesh, args.topology)
  figures: dict[str, float] = {}
  program = timed(figures, "lower", lambda: programs.lower(config, args.verb, mesh))
  figures["operations"] = len(re.findall(r"^\s+%.* = ", program.lowered.as_text(), re.MULTILINE))
  timed(figures, "low", lambda: compiler.compile_step(program, compiler.LOW_EFFORT))
  timed(figures, "full", lambda: compiler.compile_step(program))
  figures["full_over_low"] = figures["full_cpu_seconds"] / figures["low_cpu_seconds"]
  for key, value in figures.items():
    print(f"{key:24}{value:10.2f}")
  print(f"load {os.getloadavg()[0]:.1f}")
  print(json.dumps({key: round(value, 2) for key, value in figures.items()}))


if __name__ == "__main__":
  main()
