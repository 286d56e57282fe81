"""Samples completions of prompts from the teacher, on this machine or on a server.

With a translation or speech task in `tasks`, the teacher generates texts for the task's examples
instead (pseudo-labels).

Reads: generate.prompts, and the teacher (`teacher`, or generate.server for a served one). With
`tasks`: the examples of the task.

Writes: in the workdir: samples/00000.jsonl and so on (one completion per line, in files of 64 MB)
and generate.json (a summary). Prompts that cannot be used are written to the folder
samples.rejected. With generate.records_dir: a store of the same texts. With `tasks`: pairs.jsonl.
Finished samples are kept when the command is interrupted.

Config: seed, mesh, teacher, data, generate, records, tasks.

Example:
  distill-jax generate --config=configs/grade_school.py --workdir=runs/grade_school/samples
"""

from __future__ import annotations

from pathlib import Path

from distill_jax.config import Config
from distill_jax.generation import dispatch
from distill_jax.generation.job import GenerationJob
from distill_jax.generation.to_records import GeneratedStore
from distill_jax.tasks import pseudo_labels
from distill_jax.types import JsonObject


def run(config: Config, folder: Path) -> JsonObject:
  """Writes samples into `folder`; with `tasks`, pseudo-labels for a task's examples.

  Results and errors are those of `dispatch.generate` and `pseudo_labels.write_pseudo_labels`.
  """
  if config.tasks:
    return pseudo_labels.write_pseudo_labels(config, folder)
  job = GenerationJob.from_config(config)
  store = GeneratedStore(config, job.source) if config.generate.records_dir else None
  return dispatch.generate(job, folder, store=store)
