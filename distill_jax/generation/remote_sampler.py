"""Concurrent requests for samples: workers make requests, and one loop counts and writes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distill_jax.errors import InputError, bad_value
from distill_jax.generation import openai_api, outputs
from distill_jax.generation.http_client import Client, RequestFailed, RequestRefused
from distill_jax.generation.job import GenerationJob
from distill_jax.generation.journal import SampleJournal
from distill_jax.generation.openai_api import PromptIds, Responses, ServedModel
from distill_jax.generation.prompts import Prompts
from distill_jax.generation.scheduler import SampleKey
from distill_jax.runtime import distributed
from distill_jax.runtime.progress import Progress
from distill_jax.types import JsonObject

WRITE_EVERY_S = 1.0  # time between two writes of finished samples, in seconds
# Number of consecutive failures, or of refusals before the first sample, that stops the run, since
# the cause is then probably not the prompts.
MAX_CONSECUTIVE_FAILURES = 100


class Answered(NamedTuple):
  """A sample that the server generated.

  Attributes:
    row: The sample's line of the journal.
    response: The response's line of responses.jsonl.
  """

  row: outputs.JournalRow
  response: JsonObject


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
  the results, and writes.

  Args:
    job: The job.
    folder: The workdir.
    prompts: The prompts.
    journal: The finished samples.
    responses: The responses so far.

  Attributes:
    rejected: The reason for each sample that the server did not generate, by (prompt, sample).
    retried: The number of retried requests.
  """

  def __init__(
    self,
    job: GenerationJob,
    folder: Path,
    prompts: Prompts,
    journal: SampleJournal,
    responses: Responses,
  ):
    self._job, self._folder, self._prompts = job, folder, prompts
    self._journal, self._responses = journal, responses
    self._prompt_ids = PromptIds(job)
    self._skip = job.on_bad == "skip"
    self._results: asyncio.Queue[Answered | Unanswered | Exception] = asyncio.Queue()
    self._unwritten: list[Answered] = []
    self._tokens = self._missing = self._consecutive_failures = self.retried = 0
    self.rejected: dict[SampleKey, str] = {}

  async def run(self) -> float:
    """Requests all missing samples and returns the tokens per second.

    Raises:
      InputError: See `remote.generate`.
      Preempted: If SIGTERM was received.
    """
    keys = [(p, s) for p in self._prompts.prompts for s in range(self._job.samples)]
    have = {outputs.sample_key(row) for row in self._journal.rows}
    missing = [key for key in keys if key not in have]
    if self._job.server.top_logprobs:
      self._responses.check(have)
    if not missing:
      return 0.0
    self._missing, self._start = len(missing), time.perf_counter()
    with (
      distributed.Preemption() as preemption,
      Progress("generate", len(keys), "samples", start=len(have)) as self._progress,
    ):
      async with Client(self._job.server, self._job.seed) as self._client:
        await self._sample(missing, preemption)
    return self._tokens / (time.perf_counter() - self._start)

  async def _sample(self, missing: Sequence[SampleKey], preemption: distributed.Preemption) -> None:
    """Requests samples with workers that take one key after another from a shared iterator."""
    self._served = await self._served_model()
    if others := {row["model"] for row in self._journal.rows} - {self._served.name}:
      raise InputError(
        f"{self._folder} has samples from the model {min(others)}, but the server has "
        f"{self._served.name}. Serve the old model, or choose another --workdir."
      )
    keys = iter(missing)
    workers = [asyncio.create_task(self._work(keys)) for _ in missing[: self._job.server.in_flight]]
    try:
      await self._collect(preemption)
    finally:
      for worker in workers:
        worker.cancel()
      await asyncio.gather(*workers, return_exceptions=True)
      self._keep_answers()

  async def _work(self, keys: Iterator[SampleKey]) -> None:
    """Requests one sample after another, until the run has to stop."""
    for key in keys:
      answered = self._client.answered
      try:
        self._results.put_nowait(await self._request(*key))
      except RequestFailed as e:
        others = self._client.answered > answered or (self._skip and await self._is_alive())
        self._results.put_nowait(Unanswered(key, e, others))
        if not (self._skip and others):
          return
      except RequestRefused as e:
        self._results.put_nowait(Unanswered(key, e, True))
        if not self._skip:
          return
      except Exception as e:  # raised again in `_collect`
        self._results.put_nowait(e)
        return

  async def _request(self, prompt: int, sample: int) -> Answered:
    content, top = self._prompts.prompts[prompt].content, self._job.server.top_logprobs

    def parse(answer: Any) -> Answered:
      row, token_logprobs = openai_api.parse(answer, self._job.stop)
      if top and token_logprobs is None:
        raise bad_value(
          "generate.server.top_logprobs",
          top,
          f"0, since the server returns no log-probabilities for {self._served.name}",
          "Set it to 0, or use another server",
        )
      response: JsonObject = {"id": prompt, "sample": sample}
      if top:
        response |= {k: v for k, v in answer.items() if k != "id"}
        logprobs = {"logprobs": {"content": token_logprobs}}
        response["choices"] = [answer["choices"][0] | logprobs]
        response["prompt_token_ids"] = self._prompt_ids(content, answer)
      numbers = {"prompt": prompt, "sample": sample, "model": self._served.name}
      return Answered({**numbers, **row}, response)

    path, body = openai_api.request(self._job, self._served, content, prompt, sample)
    return await self._client.request(path, body, f"{prompt}/{sample}", parse)

  async def _served_model(self) -> ServedModel:
    """Returns the model that the server serves."""
    name = self._job.server.model
    try:
      return await self._client.request(
        "models", None, "models", lambda answer: ServedModel.from_answer(answer, name)
      )
    except RequestFailed as e:
      raise self._stopped(e) from e
    except RequestRefused as e:
      if not name:
        raise bad_value(
          "generate.server.model",
          name,
          f"a name, since the server does not list its models ({str(e).rstrip('.')})",
          "Name the model",
        ) from e
      return ServedModel(name)

  async def _is_alive(self) -> bool:
    """Returns True if the server responds, so that only the current request fails."""
    try:
      await self._client.request("models", None, "alive", lambda answer: answer)
    except RequestRefused:
      return True
    except RequestFailed:
      return False
    return True

  async def _collect(self, preemption: distributed.Preemption) -> None:
    """Reads the results of all requests, and writes them every WRITE_EVERY_S seconds."""
    clock = asyncio.get_running_loop().time
    while self._missing:
      with contextlib.suppress(TimeoutError):
        async with asyncio.timeout_at(clock() + WRITE_EVERY_S):
          while self._missing:
            self._take(await self._results.get())
      self._write()
      if self._missing and preemption.reached(self._tokens):
        raise distributed.Preemption.stop("generate", "finished samples are kept")

  def _take(self, result: Answered | Unanswered | Exception) -> None:
    """Counts one result, and raises InputError if the run has to stop."""
    if isinstance(result, Exception):
      raise result
    if isinstance(result, Answered):
      self._unwritten.append(result)
      self._consecutive_failures = 0
    elif isinstance(result.error, RequestFailed):
      self._consecutive_failures += 1
      is_hopeless = self._consecutive_failures >= MAX_CONSECUTIVE_FAILURES
      if is_hopeless or not (self._skip and result.server_answers):
        raise self._stopped(result.error) from result.error
      self.rejected[result.key] = f"The server {result.error}."
    else:
      self.rejected[result.key] = str(result.error)
      nothing_yet = not (self._journal.rows or self._unwritten)
      is_hopeless = nothing_yet and len(self.rejected) >= MAX_CONSECUTIVE_FAILURES
      if is_hopeless or not self._skip:
        prompt, sample = result.key
        reason = str(result.error).rstrip(".")
        skip = "" if self._skip else f", or set {self._job.key('on_bad')}=skip"
        raise InputError(
          f"Sample {sample} of prompt {prompt}: {reason}. Correct the prompt or the config{skip}."
        ) from result.error
    self._missing -= 1

  def _keep_answers(self) -> None:
    """Writes the responses that are still in the queue when the run stops."""
    while not self._results.empty():
      result = self._results.get_nowait()
      if isinstance(result, Answered):
        self._unwritten.append(result)
        self._missing -= 1
    self._write()

  def _write(self) -> None:
    """Writes the responses that are not on disk yet."""
    answers, self._unwritten = self._unwritten, []
    if self._job.server.top_logprobs:
      self._responses.add([a.response for a in answers])
    self._journal.add([a.row for a in answers], [{} for _ in answers])
    self._tokens += sum(a.row["token_count"] for a in answers)
    self.retried = self._client.retried
    rate = self._tokens / (time.perf_counter() - self._start)
    self._progress.add(len(answers), tokens_per_second=rate, retried=self.retried)

  def _stopped(self, why: RequestFailed) -> InputError:
    """Writes the responses so far and returns the error for a server that does not respond."""
    self._keep_answers()
    return InputError(
      f"The server at {self._job.server.url} {why}. {len(self._journal.rows)} samples are kept in "
      f"{self._folder} and {self._missing} are missing. Check the server and run the same command "
      "again."
    )
