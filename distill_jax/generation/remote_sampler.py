"""Requests for samples, many at once: workers make them, and one loop counts and writes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distill_jax.errors import InputError
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

WRITE_EVERY_S = 1.0  # between two writes of finished samples
# Refusals before any sample, or failures in a row: then it is not the prompts.
MAX_CONSECUTIVE_FAILURES = 100


class Answered(NamedTuple):
  """A sample that the server generated.

  Attributes:
    row: of samples.jsonl, as the journal keeps it.
    response: the line of responses.jsonl.
  """

  row: outputs.JournalRow
  response: JsonObject


class Unanswered(NamedTuple):
  """A sample that the server refused, or failed at.

  Attributes:
    server_answers: whether it answers other requests.
  """

  key: SampleKey
  error: RequestFailed | RequestRefused
  server_answers: bool


class RemoteSampler:
  """Requests the samples that are missing, several at once.

  Workers make requests and put what becomes of each into a queue; `_collect` alone reads it,
  counts, and writes.

  Attributes:
    rejected: why there is no sample, by (prompt, sample).
    retried: requests that were made again.
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
    """Requests every sample that is not there yet; returns tokens per second."""
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
    """Requests samples with workers, each of which takes the next key when it is done."""
    self._served = await self._served_model()
    if others := {row["model"] for row in self._journal.rows} - {self._served.name}:
      raise InputError(
        f"{self._folder} holds samples of {min(others)} and the server has {self._served.name}; "
        "bring the old one back or choose another --workdir"
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
    """Requests one sample after another, until one shows that the run has to stop."""
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
      except Exception as e:  # raised in `_collect`
        self._results.put_nowait(e)
        return

  async def _request(self, prompt: int, sample: int) -> Answered:
    content, top = self._prompts.prompts[prompt].content, self._job.server.top_logprobs

    def parse(answer: Any) -> Answered:
      row, token_logprobs = openai_api.parse(answer, self._job.stop)
      if top and token_logprobs is None:
        raise InputError(
          f"{self._served.name} is served without log-probabilities; set "
          "generate.server.top_logprobs=0"
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
    """The model that the server serves, as it describes it."""
    name = self._job.server.model
    try:
      return await self._client.request(
        "models", None, "models", lambda answer: ServedModel.from_answer(answer, name)
      )
    except RequestFailed as e:
      raise self._stopped(e) from e
    except RequestRefused as e:
      if not name:
        raise InputError(f"generate.server.model is empty and {e}; name the model") from e
      return ServedModel(name)

  async def _is_alive(self) -> bool:
    """Whether the server answers anything: then it is the request that it fails at."""
    try:
      await self._client.request("models", None, "alive", lambda answer: answer)
    except RequestRefused:
      return True
    except RequestFailed:
      return False
    return True

  async def _collect(self, preemption: distributed.Preemption) -> None:
    """Reads what becomes of the requests until there is no more, and writes every second."""
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
    """Counts one result. Raises InputError where the run has to stop."""
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
      self.rejected[result.key] = f"the server {result.error}"
    else:
      self.rejected[result.key] = str(result.error)
      nothing_yet = not (self._journal.rows or self._unwritten)
      is_hopeless = nothing_yet and len(self.rejected) >= MAX_CONSECUTIVE_FAILURES
      if is_hopeless or not self._skip:
        prompt, sample = result.key
        raise InputError(
          f"sample {sample} of prompt {prompt}: {result.error}; mend the prompt or the config"
          + ("" if self._skip else f", or set {self._job.key('on_bad')}=skip")
        ) from result.error
    self._missing -= 1

  def _keep_answers(self) -> None:
    """Writes the answers that are still in the queue, where the run stops."""
    while not self._results.empty():
      result = self._results.get_nowait()
      if isinstance(result, Answered):
        self._unwritten.append(result)
        self._missing -= 1
    self._write()

  def _write(self) -> None:
    """Writes the answers of which nothing is on disk."""
    answers, self._unwritten = self._unwritten, []
    if self._job.server.top_logprobs:
      self._responses.add([a.response for a in answers])
    self._journal.add([a.row for a in answers], [{} for _ in answers])
    self._tokens += sum(a.row["token_count"] for a in answers)
    self.retried = self._client.retried
    rate = self._tokens / (time.perf_counter() - self._start)
    self._progress.add(len(answers), tokens_per_second=rate, retried=self.retried)

  def _stopped(self, why: RequestFailed) -> InputError:
    """The error of a server that does not answer, once its answers so far are on disk."""
    self._keep_answers()
    return InputError(
      f"the server at {self._job.server.url} {why}; {len(self._journal.rows)} samples are kept in "
      f"{self._folder} and {self._missing} are left, so see to the server and run the same command "
      "again"
    )
