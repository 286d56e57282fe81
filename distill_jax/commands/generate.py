"""`generate`: the teacher samples completions of prompts, here or behind a server."""

from __future__ import annotations

from pathlib import Path

from distill_jax.config import Config
from distill_jax.generation import dispatch
from distill_jax.generation.job import GenerationJob
from distill_jax.generation.to_records import GeneratedStore
from distill_jax.tasks import pseudo_labels
from distill_jax.types import JsonObject


def run(config: Config, folder: Path) -> JsonObject:
  """Writes samples.jsonl into `folder`; with `tasks`, pseudo-labels of a task's examples.

  With generate.records_dir, a store of the same texts is made.

  Returns and raises what `dispatch.generate` or `pseudo_labels.write_pseudo_labels` do.
  """
  if config.tasks:
    return pseudo_labels.write_pseudo_labels(config, folder)
  job = GenerationJob.from_config(config)
  store = GeneratedStore(config, job.source) if config.generate.records_dir else None
  return dispatch.generate(job, folder, store=store)
