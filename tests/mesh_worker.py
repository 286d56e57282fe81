"""Runs verbs on several meshes in one of several processes: python mesh_worker.py JOBS FLAG ORDER.

JOBS is a JSON file with a list of (verb, workdir, config). FLAG is that of --distributed. ORDER is
"pod" for meshes of two groups of two devices in which each process of two devices has a part of
both groups, as the hosts of v5p:4x4x4 have with the mesh (1, 16, 4). A process that runs all verbs
starts jax once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
Job = tuple[str, Path, object]  # verb, workdir, resolved config


def run(jobs: Sequence[Job], file: Path, processes: int, devices: int, order: str = "") -> None:
  """Runs jobs in processes with this number of devices each; raises if a process fails."""
  from local_stores import free_port

  from distill_jax import config

  file.write_text(json.dumps([(verb, str(path), config.to_dict(c)) for verb, path, c in jobs]))
  port = free_port()
  flags = [f"localhost:{port},{processes},{i}" if processes > 1 else "" for i in range(processes)]
  env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
  env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{env.get('PYTHONPATH', '')}"
  workers = []
  for i, flag in enumerate(flags):
    with Path(f"{file}.{i}.log").open("w") as log:
      line = [sys.executable, __file__, str(file), flag, order]
      workers.append(subprocess.Popen(line, stdout=log, stderr=log, env=env))
  deadline = time.monotonic() + 500
  while any(w.poll() is None for w in workers):
    if any(w.poll() for w in workers) or time.monotonic() > deadline:
      time.sleep(1)  # the other processes may report the same error
      for w in workers:
        w.kill()
    time.sleep(0.05)
  codes = [w.wait() for w in workers]
  logs = [Path(f"{file}.{i}.log").read_text()[-3000:] for i in range(processes)]
  assert codes == [0] * processes, (codes, *logs)


def use_order_of_a_pod() -> None:
  """Makes the tensor axis cross processes where a process has devices of several groups."""
  import numpy as np
  from jax.sharding import Mesh

  from distill_jax.nn import sharding

  real = sharding.make_mesh

  def make_mesh(*args: int, **sizes: int) -> Mesh:
    mesh = real(*args, **sizes)
    grid = np.transpose(mesh.devices.reshape(2, 2)).reshape(mesh.devices.shape)
    return Mesh(grid, mesh.axis_names, axis_types=mesh.axis_types)

  sharding.make_mesh = make_mesh


def main(jobs: Path, flag: str, order: str) -> None:
  from distill_jax.runtime import distributed

  distributed.initialize(flag)
  from distill_jax import config
  from distill_jax.commands import evaluate, export, generate, record, shrink, train
  from distill_jax.runtime.workdir import Workdir

  if order == "pod":
    use_order_of_a_pod()
  verbs = {
    "record": record.run,
    "train": train.run,
    "evaluate": evaluate.run,
    "export": export.run,
    "generate": generate.run,
    "shrink": shrink.run,
  }
  for verb, path, tree in json.loads(jobs.read_text()):
    c = config.from_dict(tree)
    began = time.monotonic()
    with Workdir(Path(path), c) as folder:
      verbs[verb](c, folder)
    print(f"{verb} {path}: {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
  main(Path(sys.argv[1]), *sys.argv[2:])
