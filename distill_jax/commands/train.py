"""Trains a student on the records of its teachers, or with teachers in the training step.

A run resumes from its last checkpoint when the command is run again.

Reads: the student (`student`), the stores in train.records and train.heldout, the files of the
benchmarks in train.eval_benchmarks (to which `evals`, `evaluate` and `generate` apply) and, for
online teachers, `teacher` and `teachers`.

Writes: in the workdir: metrics.jsonl (the metrics of each step), event files for TensorBoard,
checkpoints/ and, with held-out stores, heldout.json (how often they are evaluated). With
train.eval_benchmarks, also answers and grades, in evals/step-N/BENCHMARK.

Config: seed, mesh, student, teacher, teachers, data, losses, optim, train, tasks, augmentations,
evals, evaluate, generate.

Example:
  distill-jax train --config=configs/demo.py:distilled --workdir=runs/demo/distilled
"""

from __future__ import annotations

from pathlib import Path

from distill_jax.config import Config
from distill_jax.training import loop
from distill_jax.types import JsonObject


def run(config: Config, workdir: Path) -> JsonObject:
  """Trains the student; see `loop.train`, which evaluates it on train.eval_benchmarks too."""
  benchmarks = None
  if config.train.eval_benchmarks:
    from distill_jax.evals.in_training import Benchmarks  # imports all that generates texts

    benchmarks = Benchmarks(config, workdir)
  return loop.train(config, workdir, benchmarks)
