"""Concurrent requests for samples: workers make requests, and one loop counts and writes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from distill_jax.data import jsonl
from distill_jax.errors import InputError, Unavailable, bad_value
from distill_jax.generation import openai_api, outputs, served_model
from distill_jax.generation.finished import ALL, Finished, SampleKey
from distill_jax.generation.http_client import Client, RequestFailed, RequestRefused
from distill_jax.generation.job import GenerationJob
from distill_jax.generation.journal import SampleJournal
from distill_jax.generation.openai_api import PromptIds
from distill_jax.generation.prompts import Prompt, Prompts, Summary, missing_samples
from distill_jax.generation.segments import RESPONSES
from distill_jax.runtime import distributed
from distill_jax.runtime.progress import Progress
from distill_jax.types import JsonObject

WRITE_EVERY_S = 1.0  # time between two writes of finished samples, in seconds
# Number of consecutive failures, or of refusals before the first sample, that stops the run, since
# the cause is then probably not the prompts.
MAX_CONSECUTIVE_FAILURES = 100


class Unanswered(NamedTuple):
  """A sample that the server refused or failed to generate.

  Attributes:
    key: The indices of the prompt and the sample.
    error: The error.
    server_answers: True if the server answers other requests.
  """

  key: SampleKey
  error: RequestFailed | RequestRefused
  server_answers: bool


class RemoteSampler:
  """Requests the missing samples of a job concurrently.

  Workers make requests and put the results into a queue. Only `_collect` reads the queue, counts
  the results, and writes. Prompts are read when a worker needs one, and workers wait while as many
  results as workers are not written, so memory holds at most two samples per request in flight.

  Args:
    job: The job.
    folder: The workdir.
    prompts: The prompts.
    summary: The numbers of prompts.
    journal: The finished samples.

  Attributes:
    last_reason: The reason for the last sample that is rejected.
    retried: The number of retried requests.
  """

  def __init__(
    self,
    job: GenerationJob,
    folder: Path,
    prompts: Prompts,
    summary: Summary,
    journal: SampleJournal,
  ):
    self._job, self._folder, self._prompts, self._journal = job, folder, prompts, journal
    self._total = summary.prompts * job.samples
    self._prompt_ids = PromptIds(job)
    self._skip = job.on_bad == "skip"
    self._results: asyncio.Queue[Finished | Unanswered | Exception | None]
    self._results = asyncio.Queue(job.server.in_flight)
    self._unwritten: list[Finished] = []
    self._held: list[Finished] = []  # rejected samples, before the first sample
    self._progress: Progress | None = None
    self._tokens = self._consecutive_failures = self._refused = self.retried = 0
    self.last_reason = ""

  async def run(self) -> float:
    """Requests all missing samples and returns the tokens per second.

    Raises:
      InputError: See `remote.generate`.
      Unavailable: If no server answers.
      Preempted: If SIGTERM was received.
    """
    done = self._journal.done()
    tasks = self._tasks(missing_samples(self._prompts.read(done.first), self._job.samples, done))
    first = next(tasks, None)
    self._start = time.perf_counter()
    if first is None:
      self._write()
      return 0.0
    with (
      distributed.Preemption() as preemption,
      Progress(
        "generate", self._total, "samples", start=self._journal.counts.samples
      ) as self._progress,
    ):
      async with Client(self._job.server, self._job.seed) as self._client:
        await self._sample(itertools.chain([first], tasks), preemption)
    return self._tokens / (time.perf_counter() - self._start)

  def _tasks(self, missing: Iterator[tuple[Prompt, int]]) -> Iterator[tuple[Prompt, int]]:
    """Yields the samples to request, and rejects prompts that cannot be used."""
    for prompt, sample in missing:
      if sample == ALL:
        self._unwritten.append(outputs.rejected_sample(prompt.number, ALL, prompt.rejected))
      else:
        yield prompt, sample

  async def _sample(
    self, tasks: Iterator[tuple[Prompt, int]], preemption: distributed.Preemption
  ) -> None:
    """Requests samples with workers that take one after another from a shared iterator."""
    try:
      self._served = await served_model.find(self._client, self._job.server.model)
    except RequestFailed as e:
      raise self._stopped(e, others_answer=False) from e
    self._journal.set_model(self._served.name)
    count = self._job.server.in_flight
    workers = [asyncio.create_task(self._work(tasks)) for _ in range(count)]
    try:
      await self._collect(preemption, count)
    finally:
      for worker in workers:
        worker.cancel()
      await asyncio.gather(*workers, return_exceptions=True)
      self._keep_answers()

  async def _work(self, tasks: Iterator[tuple[Prompt, int]]) -> None:
    """Requests one sample after another, until the run has to stop; then puts None."""
    for prompt, sample in tasks:
      key, answered = (prompt.number, sample), self._client.answered
      result: Finished | Unanswered | Exception
      try:
        result = await self._request(prompt, sample)
      except RequestFailed as e:
        others = self._client.answered > answered or (self._skip and await self._is_alive())
        result = Unanswered(key, e, others)
      except RequestRefused as e:
        result = Unanswered(key, e, True)
      except Exception as e:  # raised again in `_collect`
        result = e
      await self._results.put(result)
      if isinstance(result, Exception) or (
        isinstance(result, Unanswered) and not (self._skip and result.server_answers)
      ):
        return
    await self._results.put(None)

  async def _request(self, prompt: Prompt, sample: int) -> Finished:
    content, top = prompt.content, self._job.server.top_logprobs

    def parse(answer: Any) -> Finished:
      row, token_logprobs = openai_api.parse(answer, self._job.stop)
      if top and token_logprobs is None:
        raise bad_value(
          "generate.server.top_logprobs",
          top,
          f"0, since the server returns no log-probabilities for {self._served.name}",
          "Set it to 0, or use another server",
        )
      parts = {}
      if top:
        response: JsonObject = {"id": prompt.number, "sample": sample}
        response |= {k: v for k, v in answer.items() if k != "id"}
        logprobs = {"logprobs": {"content": token_logprobs}}
        response["choices"] = [answer["choices"][0] | logprobs]
        response["prompt_token_ids"] = self._prompt_ids(content, answer)
        parts[RESPONSES] = jsonl.to_line(response)
      return outputs.finished_sample(prompt, sample, {"model": self._served.name, **row}, parts)

    path, body = openai_api.request(self._job, self._served, content, prompt.number, sample)
    return await self._client.request(path, body, f"{prompt.number}/{sample}", parse)

  async def _is_alive(self) -> bool:
    """Returns True if a server responds, so that only the current request fails."""
    try:
      await self._client.request("models", None, "alive", lambda answer: answer)
    except RequestRefused:
      return True
    except RequestFailed:
      return False
    return True

  async def _collect(self, preemption: distributed.Preemption, workers: int) -> None:
    """Reads the results of all requests, and writes them every WRITE_EVERY_S seconds."""
    clock = asyncio.get_running_loop().time
    while workers:
      with contextlib.suppress(TimeoutError):
        async with asyncio.timeout_at(clock() + WRITE_EVERY_S):
          while workers and len(self._unwritten) < self._results.maxsize:
            result = await self._results.get()
            workers -= result is None
            self._take(result)
      await asyncio.to_thread(self._write)
      if workers and preemption.reached():
        raise distributed.Preemption.stop("generate", "finished samples are kept")

  def _take(self, result: Finished | Unanswered | Exception | None) -> None:
    """Counts one result, and raises an error if the run has to stop."""
    if result is None:
      return
    if isinstance(result, Exception):
      raise result
    if isinstance(result, Finished):
      self._unwritten.append(result)
      self._consecutive_failures = 0
      return
    prompt, sample = result.key
    if isinstance(result.error, RequestFailed):
      self._consecutive_failures += 1
      is_hopeless = self._consecutive_failures >= MAX_CONSECUTIVE_FAILURES
      if is_hopeless or not (self._skip and result.server_answers):
        raise self._stopped(result.error, result.server_answers) from result.error
      self.last_reason = f"The server {result.error}."
    else:
      self._refused += 1
      is_hopeless = not self._has_samples() and self._refused >= MAX_CONSECUTIVE_FAILURES
      if is_hopeless or not self._skip:
        reason = str(result.error).rstrip(".")
        skip = "" if self._skip else f", or set {self._job.key('on_bad')}=skip"
        raise InputError(
          f"Sample {sample} of prompt {prompt}: {reason}. Correct the prompt or the config{skip}."
        ) from result.error
      self.last_reason = str(result.error)
    self._unwritten.append(outputs.rejected_sample(prompt, sample, self.last_reason))

  def _has_samples(self) -> bool:
    return bool(self._journal.counts.samples) or any(f.reason for f in self._unwritten)

  def _keep_answers(self) -> None:
    """Writes the responses that are still in the queue when the run stops."""
    while not self._results.empty():
      result = self._results.get_nowait()
      if isinstance(result, Finished):
        self._unwritten.append(result)
    self._write()

  def _write(self) -> None:
    """Writes the responses that are not stored yet.

    Rejected samples are held back until the first sample, since before it the cause is probably not
    the prompts, and the next run has to request them again.
    """
    if not self._has_samples():
      self._held, self._unwritten = self._held + self._unwritten, []
      return
    finished, self._held, self._unwritten = self._held + self._unwritten, [], []
    self._journal.add(finished)
    if self._progress is None:
      return
    self._tokens += sum(f.tokens for f in finished)
    self.retried = self._client.retried
    rate = self._tokens / (time.perf_counter() - self._start)
    samples = sum(bool(f.reason) for f in finished)
    self._progress.add(samples, tokens_per_second=rate, retried=self.retried)

  def _stopped(self, why: RequestFailed, others_answer: bool) -> InputError | Unavailable:
    """Writes the responses so far and returns the error for servers that do not respond."""
    self._keep_answers()
    count = self._journal.counts.samples
    kept = f"{count} of {self._total} samples are kept in {self._folder}"
    if others_answer:  # running the command again would stop at the same request
      skip = "" if self._skip else f", or set {self._job.key('on_bad')}=skip"
      return InputError(
        f"{self._client.servers.names} {why}, while other requests are answered. {kept}. Check the "
        f"server{skip}."
      )
    return Unavailable(
      f"{self._client.servers.names} {why}. {kept}. Check the server and run the same command "
      "again."
    )
