"""Trains a student on the records of its teachers, or with teachers in the training step.

A run resumes from its last checkpoint when the command is run again.

Reads: the student (`student`), the stores in train.records and train.heldout and, for online
teachers, `teacher` and `teachers`.

Writes: in the workdir: metrics.jsonl (the metrics of each step), event files for TensorBoard,
checkpoints/ and, with held-out stores, heldout.json (how often they are evaluated).

Config: seed, mesh, student, teacher, teachers, data, losses, optim, train, tasks, augmentations.

Example:
  distill-jax train --config=configs/demo.py:distilled --workdir=runs/demo/distilled
"""

from distill_jax.training.loop import train as run

__all__ = ["run"]
