"""Trains a student on texts that it samples itself and that its teachers score, in rounds.

Before each round of on_policy.every steps, the student continues the prompts. With
train.online=True the teacher runs in the step, and the losses compare whole distributions;
otherwise the teachers score the texts first (records.kind), on this machine or on servers. The
steps, losses, metrics, checkpoints and evaluations are those of `train`. A run that was
interrupted anywhere continues with the same result when the command is run again.

Reads: the student (`student`), generate.prompts, and the teachers (`teacher`, `teachers`, or
generate.server for a served one); with on_policy.records_fraction also the stores in
train.records. The rest is as in `train`.

Writes: in the workdir: what `train` writes, and rounds/NUMBER/TEACHER: the last rounds' texts
(rollouts) and their scores (records), which are stores, and rounds/NUMBER/rollouts.json: their
lengths, ends and rewards.

Config: seed, mesh, student, teacher, teachers, data, losses, optim, train, on_policy, generate,
records, filters, evals, evaluate.

Example:
  distill-jax on_policy --config=configs/qwen3_8b_on_policy.py --workdir=runs/qwen3_8b
"""

from __future__ import annotations

import functools
from pathlib import Path

from distill_jax.config import Config
from distill_jax.evals.in_training import Benchmarks
from distill_jax.on_policy.feed import RoundsFeed
from distill_jax.training import loop
from distill_jax.types import JsonObject


def run(config: Config, workdir: Path) -> JsonObject:
  """Trains the student in rounds; returns what `loop.train` returns."""
  benchmarks = Benchmarks(config, workdir) if config.train.eval_benchmarks else None
  return loop.train(config, workdir, benchmarks, functools.partial(RoundsFeed, config, workdir))
