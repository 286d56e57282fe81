"""Sampling wherever a job's model runs: on a server, or here."""

from __future__ import annotations

from pathlib import Path

from distill_jax.errors import InputError
from distill_jax.generation import local, openai_api
from distill_jax.generation.job import GenerationJob
from distill_jax.generation.to_records import GeneratedStore
from distill_jax.types import JsonObject


def generate(
  job: GenerationJob,
  folder: Path,
  load_model: local.LoadModel | None = None,
  store: GeneratedStore | None = None,
) -> JsonObject:
  """Writes a job's samples into `folder`: see local.generate and remote.generate.

  Args:
    load_model: gives a model that runs here; None loads job.model.
    store: receives the texts of a model that runs here.

  Raises:
    InputError: a store is wanted of a server's texts; and what the two raise.
  """
  if not job.server.url:
    return local.generate(job, folder, load_model, store)
  if store is not None:
    raise InputError(
      "generate.records_dir is for a teacher here; leave it empty, and `record` the server's "
      f"{openai_api.RESPONSES}"
    )
  from distill_jax.generation import remote  # needs an extra

  return remote.generate(job, folder)
