"""Sampling from a model on an OpenAI-compatible server, such as vLLM or SGLang.

There is one request per sample: to chat/completions for messages, and to completions for text. The
seed of a request depends only on (seed, prompt, sample), so a repeated request is identical. The
server determines whether the text is identical too.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import jax

from distill_jax.errors import InputError, bad_value
from distill_jax.generation import outputs, server_checks
from distill_jax.generation.job import GenerationJob
from distill_jax.generation.prompts import Prompts
from distill_jax.generation.remote_sampler import RemoteSampler
from distill_jax.types import JsonObject


def generate(job: GenerationJob, folder: Path) -> JsonObject:
  """Samples texts from servers and writes them to `folder`; see outputs.py.

  The format is that of `local.generate`, with these differences:
    model: The name of the model, an additional field.
    token_count: The number of tokens as the server counts them.
    logprob, logprob_mean: Present only if the server returns them.
    text: Reasoning in a separate field is put before the text in DeepSeek-R1's format,
      "<think>\\n…\\n</think>\\n\\n…". Without an answer, the reasoning is not closed.
    reason: "stop", "eos" or "length". If the server does not tell whether a stop string or the
      model ended the text, the reason is "stop" if the job has stop strings.
  With server.top_logprobs, the responses are written to responses/00000.jsonl and so on, which
  `record` reads with records.logprobs and records.logprobs_format="openai".

  With on_bad="skip", the samples that the server refuses, or fails on while it answers other
  requests, are rejected. An interrupted run is resumed: finished and rejected samples are not
  requested again.

  Args:
    job: The job.
    folder: The workdir.

  Returns:
    A dict with prompts, rejected, samples, tokens (their numbers), the number of samples for each
    reason, the number of retried requests, and tokens_per_second of this run.

  Raises:
    InputError: If the job is invalid, the server refuses a request, or its responses lack required
      fields. Finished samples are kept.
    Unavailable: If no server answers. Finished samples are kept.
    Preempted: If SIGTERM was received. Finished samples are kept.
  """
  _check(job)
  prompts = Prompts(job)
  summary = prompts.summary()
  origin = {"prompts": summary.digest, "teacher": {"served": job.server.model}}
  if result := outputs.finished_result(folder, origin):
    return result
  journal = outputs.open_journal(folder, origin, job.samples)
  sampler = RemoteSampler(job, folder, prompts, summary, journal)
  rate = asyncio.run(sampler.run())
  if not journal.counts.samples:
    reason = sampler.last_reason.rstrip(".")
    raise InputError(f"The server rejected all requests. The last reason: {reason}.")
  journal.finish()
  result = {"prompts": summary.prompts, "retried": sampler.retried}
  return outputs.finish(folder, origin, journal, result) | {"tokens_per_second": rate}


def _check(job: GenerationJob) -> None:
  """Checks the settings of a job for a server."""
  job.check()
  server_checks.check(job.server)
  if job.repetition:
    raise bad_value(
      "generate.repetition",
      job.repetition,
      "0 for a model on a server",
      "Use the filter `repetition` instead",
    )
  if not all(job.stop):
    raise bad_value(
      "generate.stop", job.stop, "strings that are not empty", "Remove the empty string"
    )
  if jax.process_count() > 1:
    raise InputError("Only one process can send requests to a server. Remove --distributed.")
