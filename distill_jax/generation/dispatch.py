"""Running a generation job on the local devices or on a server."""

from __future__ import annotations

from pathlib import Path

from distill_jax.errors import bad_value
from distill_jax.generation import local
from distill_jax.generation.job import GenerationJob
from distill_jax.generation.to_records import GeneratedStore
from distill_jax.types import JsonObject


def generate(
  job: GenerationJob,
  folder: Path,
  load_model: local.LoadModel | None = None,
  store: GeneratedStore | None = None,
) -> JsonObject:
  """Writes a job's samples into `folder`; see `local.generate` and `remote.generate`.

  Args:
    job: The job.
    folder: The workdir.
    load_model: Returns a local model. None: job.model is loaded.
    store: A store that receives the texts of a local model. None: no store.

  Returns:
    The result of `local.generate` or `remote.generate`.

  Raises:
    InputError: If a store is requested for a model on a server. See also the two functions.
    Preempted: If SIGTERM was received. Finished samples are kept.
  """
  if not job.server.urls:
    return local.generate(job, folder, load_model, store)
  if store is not None:
    raise bad_value(
      "generate.records_dir",
      store.config.generate.records_dir,
      "'' for a teacher on a server",
      "Leave it empty, set generate.server.top_logprobs, and run `record` on the responses",
    )
  from distill_jax.generation import remote  # needs an extra

  return remote.generate(job, folder)
