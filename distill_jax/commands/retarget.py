"""Converts records to a student's tokenizer, to train a student with other tokens on them.

A teacher is recorded once, in its own tokens. This command makes an ordinary store for each
tokenizer: texts are tokenized by the student's tokenizer, and the teacher's samples are projected
to the student's tokens through the bytes of both (docs/cross-tokenizer.md). No model runs. Finished
shards are skipped when the command is run again.

retarget.dry_run=True prints the statistics of a sample, and what the whole would take, and needs no
--workdir. To use several machines, give each a share of the shards, e.g. retarget.slice=0/16, and
run the command once more without it, which finishes the stores.

Reads: the stores in retarget.records, of the training rows, of held-out rows and of data.buckets;
the tokenizers of the teacher (`teacher`, or data.tokenizer) and of the student (retarget.tokenizer,
or `student`).

Writes: in the workdir, the same stores in the student's tokens: manifest.json and shards
(*.array_record), for train.records; and retarget.json with statistics, which `inspect` prints.

Config: seed, retarget, teacher, student, data.

Example:
  distill-jax retarget --config=configs/r1_qwen_7b.py --workdir=runs/r1/qwen
"""

from __future__ import annotations

from pathlib import Path

from distill_jax.config import Config
from distill_jax.records import planned_stores
from distill_jax.retarget.job import Job
from distill_jax.runtime import distributed
from distill_jax.types import JsonObject


def run(config: Config, folder: Path | None = None) -> JsonObject:
  """Converts the stores of retarget.records into `folder`, or measures a sample of them.

  Args:
    config: The config.
    folder: The workdir; None with retarget.dry_run.

  Returns:
    What `Job.convert` or `Job.measure` returns, with keys such as heldout/rows for the other
    stores.

  Raises:
    InputError: A store cannot be converted, the tokenizers do not fit, or the folder holds other
      records. It is raised before anything is converted, except for a damaged record.
    Preempted: SIGTERM was received; finished shards are kept.
  """
  distributed.require_one_process("retarget", "shards")
  job = Job.of(config)
  if config.retarget.dry_run:
    return planned_stores.flat(job.measure())
  assert folder is not None
  return planned_stores.flat(job.convert(folder))


def needs_workdir(config: Config) -> bool:
  """Returns whether a call writes into its workdir."""
  return not config.retarget.dry_run


def part(config: Config) -> str:
  """Returns the part of the work of a call; calls of other parts may run at the same time."""
  return f"-{config.retarget.slice.replace('/', '-')}" if config.retarget.slice else ""
