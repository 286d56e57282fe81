"""Samples rounds of rollouts in one of several processes: rollouts_worker.py CONFIG FOLDER FLAG."""

import json
import sys
from pathlib import Path


def main(file: str, folder: str, flag: str) -> None:
  from distill_jax.runtime import distributed

  distributed.initialize(flag)
  import jax

  from distill_jax import config
  from distill_jax.models import loading, runs
  from distill_jax.on_policy.rollouts import Rollouts

  c = config.from_dict(json.loads(Path(file).read_text()))
  mesh = c.mesh.make()
  student = loading.open_source(c.student, c.seed)
  rollouts = Rollouts(c, student, mesh, Path(folder))
  rollouts.check()

  def model():
    with jax.set_mesh(mesh):
      return student.load(mesh, runs.keys(c.seed)["student"])

  for number in range(2):
    stores = rollouts.generate(number, "f", model)
    print(json.dumps({name: store.manifest.digest for name, store in stores.items()}), flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
