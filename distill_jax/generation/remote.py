"""Sampling by a model behind an OpenAI-compatible server, such as vLLM or SGLang.

Messages go to chat/completions and text to completions, one request a sample, each with a seed
made of (seed, prompt, sample): a request is the same whenever it is made. Whether the server then
generates the same text is up to the server.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path

import jax

from distill_jax.errors import InputError
from distill_jax.generation import outputs
from distill_jax.generation.job import GenerationJob
from distill_jax.generation.journal import SampleJournal
from distill_jax.generation.openai_api import Responses
from distill_jax.generation.prompts import read_prompts
from distill_jax.generation.remote_sampler import RemoteSampler
from distill_jax.runtime import extras
from distill_jax.types import JsonObject

with extras.needed("serve"):
  import httpx2


def generate(job: GenerationJob, folder: Path) -> JsonObject:
  """Writes samples.jsonl into `folder`, as local.generate does, of a server's texts.

  A sample has `model` and `token_count`, as the server gives them; `tokens` and the
  log-probabilities only where the server gives them. Reasoning that a server sets apart comes
  before the text as DeepSeek-R1 writes it, "<think>\\n…\\n</think>\\n\\n…"; where nothing follows,
  it is left open. `reason` is stop, eos or length; where a server does not tell whether a stop
  string or the model ended a text, it is taken for the string if the job has any. With
  top_logprobs, responses.jsonl has the answers, for `record` with records.logprobs and
  records.logprobs_format=openai.

  samples.rejected.jsonl has the prompts that cannot be used, and with on_bad=skip the samples
  that the server refuses, or fails at while it answers others. A run that was stopped continues:
  no finished sample is requested again.

  Returns:
    prompts, rejected, samples, tokens, the number of samples for each reason, retried requests,
    and tokens_per_second of this process's part.

  Raises:
    InputError: job and prompts do not fit together; the server refuses a request, or does
      not answer, or not with what is needed. Finished samples are kept.
    Preempted: SIGTERM was received; finished samples are kept.
  """
  _check(job)
  prompts = read_prompts(job)
  digest = hashlib.sha256(json.dumps([*prompts.prompts.items()]).encode()).hexdigest()
  origin = {"prompts": digest, "teacher": {"served": job.server.model}}
  if result := outputs.finished_result(folder, origin):
    return result
  with SampleJournal(folder, origin, None) as journal, Responses(folder) as responses:
    sampler = RemoteSampler(job, folder, prompts, journal, responses)
    rate = asyncio.run(sampler.run())
    rejected = [{"id": p, "sample": s, "reason": w} for (p, s), w in sampler.rejected.items()]
    rows = sorted(journal.rows, key=outputs.sample_key)
    expected = len(prompts.prompts) * job.samples
    assert len(rows) + len(rejected) == expected, "a sample is lost"
    if not rows:
      raise InputError(f"the server refuses all that is asked; first: {rejected[-1]['reason']}")
    if job.server.top_logprobs:
      responses.publish([outputs.sample_key(row) for row in rows])
    result = {
      "prompts": len(prompts.prompts),
      "rejected": outputs.write_rejected(folder, prompts, rejected),
      "samples": len(rows),
      "tokens": sum(row["token_count"] for row in rows),
      **outputs.count_reasons(rows),
      "retried": sampler.retried,
    }
    outputs.write_samples(folder, rows, prompts)
    outputs.finish(folder, origin, result, journal)
    responses.remove()
  return result | {"tokens_per_second": rate}


def _check(job: GenerationJob) -> None:
  """Refuses what a server cannot do, and numbers out of their range."""
  s = job.server
  for key, value, minimum in (
    (job.key("samples"), job.samples, 1),
    (job.key("max_new_tokens"), job.max_new_tokens, 1),
    ("generate.server.in_flight", s.in_flight, 1),
    ("generate.server.timeout_s", s.timeout_s, 1e-3),
    ("generate.server.retries", s.retries, 0),
    ("generate.server.top_logprobs", s.top_logprobs, 0),
    ("generate.server.requests_per_minute", s.requests_per_minute, 0),
  ):
    if value < minimum:
      raise InputError(f"{key} is {value}; it is at least {minimum}")
  if not _is_address(s.url):  # and it is not repeated: it may hold a password
    raise InputError(
      "generate.server.url is no address of a server; give one as http://localhost:8000/v1, and "
      "a key by generate.server.api_key_env"
    )
  if job.repetition:
    raise InputError(
      "generate.repetition is for a teacher here; set it to 0, and filter what a server repeats"
    )
  if not all(job.stop):
    raise InputError("generate.stop holds an empty string, which ends every text; leave it out")
  if jax.process_count() > 1:
    raise InputError("a server is asked by one process; leave --distributed out")


def _is_address(url: str) -> bool:
  try:
    parsed = httpx2.URL(url)
  except httpx2.InvalidURL:
    return False
  return parsed.scheme in ("http", "https") and bool(parsed.host) and not parsed.userinfo
