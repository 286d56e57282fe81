"""`generate` by a teacher behind an OpenAI-compatible server, as vLLM and SGLang are.

Messages go to chat/completions and text to completions, a request a sample, each with a seed
made of (config.seed, prompt, sample): what is asked is the same whenever it is asked. Whether
the server then says the same is the server's affair.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import jax

from distill_jax.config import Config
from distill_jax.errors import InputError
from distill_jax.generation import openai_api, outputs
from distill_jax.generation import prompts as reading
from distill_jax.generation.http_client import Client, Failed, Refused
from distill_jax.generation.journal import SampleJournal
from distill_jax.generation.openai_api import RESPONSES, PromptIds, Responses, Served
from distill_jax.generation.sampling import Sampling
from distill_jax.generation.scheduler import SampleKey
from distill_jax.runtime import distributed
from distill_jax.runtime.progress import Progress

GROUP_S = 1.0  # between two writes of what is finished
HOPELESS = 100  # refusals before any sample, or failures in a row: it is not the prompts


def generate(config: Config, folder: Path) -> dict[str, Any]:
  """Writes samples.jsonl into `folder`, as generate.py does, from what a server says.

  A sample has `model` and `token_count`, as the server says; `tokens` and the log-probabilities
  only where the server gives them. Reasoning that a server sets apart comes before the text as
  DeepSeek-R1 writes it, "<think>\\n…\\n</think>\\n\\n…"; where nothing follows, it is left
  open. `reason` is stop, eos or length; a server that does not say whether a stop string or
  the model ended a text is taken to mean the string where generate.stop has any. With
  top_logprobs, responses.jsonl has the answers, for `record` with records.logprobs and
  records.logprobs_format=openai.

  samples.rejected.jsonl has the prompts that cannot be used, and with generate.on_bad=skip
  the samples that the server refuses, or fails at while it answers others. The same command
  goes on where it was stopped: no finished sample is asked for again.

  Returns: prompts, rejected, samples, tokens, how many of each reason, retried requests, and
    tokens_per_second of this process's part.

  Raises:
    InputError: config and prompts do not fit together; the server refuses a request, or does
      not answer, or not with what is needed. Finished samples are kept.
    Preempted: SIGTERM came; the same.
  """
  _check(config)
  prompts, c = reading.read(config), config.generate
  digest = hashlib.sha256(json.dumps([*prompts.said.items()]).encode()).hexdigest()
  about = {"prompts": digest, "teacher": {"served": c.server.model}}
  if before := outputs.before(folder, about):
    return before[0]
  with SampleJournal(folder, about, None) as finished, Responses(folder) as responses:
    asking = _Asking(config, folder, prompts, finished, responses)
    rate = asyncio.run(asking.run())
    rejected = [{"id": p, "sample": s, "reason": w} for (p, s), w in asking.rejected.items()]
    rows = sorted(finished.rows, key=outputs.number)
    assert len(rows) + len(asking.rejected) == len(prompts.said) * c.samples, "a sample is lost"
    if not rows:
      raise InputError(f"the server refuses all that is asked; first: {rejected[-1]['reason']}")
    if c.server.top_logprobs:
      responses.publish([outputs.number(row) for row in rows])
    result = {
      "prompts": len(prompts.said),
      "rejected": outputs.write_rejected(folder, prompts, rejected),
      "samples": len(rows),
      "tokens": sum(row["token_count"] for row in rows),
      **outputs.reasons(rows),
      "retried": asking.retried,
    }
    outputs.write(folder, rows, prompts)
    outputs.finish(folder, about, result, finished)
    responses.remove()
  return result | {"tokens_per_second": rate}


def _check(config: Config) -> None:
  c, s = config.generate, config.generate.server
  for name, value, least in (
    ("samples", c.samples, 1),
    ("max_new_tokens", c.max_new_tokens, 1),
    ("server.in_flight", s.in_flight, 1),
    ("server.timeout_s", s.timeout_s, 1e-3),
    ("server.retries", s.retries, 0),
    ("server.top_logprobs", s.top_logprobs, 0),
    ("server.requests_per_minute", s.requests_per_minute, 0),
  ):
    if value < least:
      raise InputError(f"generate.{name} is {value}; it is at least {least}")
  try:
    url = httpx2.URL(s.url)
    good = url.scheme in ("http", "https") and url.host and not url.userinfo
  except httpx2.InvalidURL:
    good = False
  if not good:  # and it is not repeated: it may hold a password
    raise InputError(
      "generate.server.url is no address of a server; give one as http://localhost:8000/v1, and "
      "a key by generate.server.api_key_env"
    )
  if c.repetition or c.records_dir:
    raise InputError(
      "generate.repetition and generate.records_dir are for a teacher here; filter what a server "
      f"repeats, and `record` its {RESPONSES}"
    )
  if not all(c.stop):
    raise InputError("generate.stop holds an empty string, which ends every text; leave it out")
  if jax.process_count() > 1:
    raise InputError("a server is asked by one process; leave --distributed out")
  Sampling.of(c)


class _Asking:
  """The samples that a run asks for, and what becomes of them.

  Attributes:
    rejected: why there is no sample, by (prompt, sample).
    retried: requests that were made again.
  """

  def __init__(
    self,
    config: Config,
    folder: Path,
    prompts: reading.Prompts,
    finished: SampleJournal,
    responses: Responses,
  ):
    self._config, self._folder, self._prompts = config, folder, prompts
    self._finished, self._responses = finished, responses
    self._ids = PromptIds(config)
    self._done: list[tuple[dict[str, Any], dict[str, Any]]] = []
    self._tokens = self._left = self._barren = self.retried = 0
    self.rejected: dict[SampleKey, str] = {}

  async def run(self) -> float:
    """Asks for what is not there yet. Returns how many tokens came a second."""
    c = self._config.generate
    wanted = [(p, s) for p in self._prompts.said for s in range(c.samples)]
    have = {outputs.number(row) for row in self._finished.rows}
    todo = [w for w in wanted if w not in have]
    if c.server.top_logprobs:
      self._responses.check(have)
    if not todo:
      return 0.0
    self._left, self._start = len(todo), time.perf_counter()
    with (
      distributed.Preemption() as preemption,
      Progress("generate", len(wanted), "samples", start=len(have)) as self._progress,
    ):
      async with Client(c.server, self._config.seed) as self._client:
        await self._all(todo, preemption)
    return self._tokens / (time.perf_counter() - self._start)

  async def _all(self, todo: list[SampleKey], preemption: distributed.Preemption) -> None:
    self._served = await self._who()
    if others := {row["model"] for row in self._finished.rows} - {self._served.model}:
      raise InputError(
        f"{self._folder} holds samples of {min(others)} and the server has {self._served.model}; "
        "bring the old one back or choose another --workdir"
      )
    left = iter(todo)
    workers = [
      asyncio.create_task(self._work(left)) for _ in todo[: self._config.generate.server.in_flight]
    ]
    try:
      running = set(workers)
      while running:
        over, running = await asyncio.wait(
          running, timeout=GROUP_S, return_when=asyncio.FIRST_EXCEPTION
        )
        self._write()
        for worker in over:
          worker.result()
        if running and preemption.reached(self._tokens):
          raise distributed.Preemption.stop("generate", "finished samples are kept")
    finally:
      for worker in workers:
        worker.cancel()
      await asyncio.gather(*workers, return_exceptions=True)
      self._write()

  async def _who(self) -> Served:
    """What the server says of itself."""
    name = self._config.generate.server.model
    try:
      return await self._client.ask("models", None, "models", lambda said: Served.of(said, name))
    except Failed as e:
      raise self._stopped(e) from e
    except Refused as e:
      if not name:
        raise InputError(f"generate.server.model is empty and {e}; name the model") from e
      return Served(name)

  async def _alive(self) -> bool:
    """Whether the server answers anything: then it is the request that it fails at."""
    try:
      await self._client.ask("models", None, "alive", lambda said: said)
    except Refused:
      return True
    except Failed:
      return False
    return True

  async def _work(self, todo: Iterator[SampleKey]) -> None:
    """Asks for one sample after another."""
    skip = self._config.generate.on_bad == "skip"
    for wanted in todo:
      answered = self._client.answered
      try:
        come = await self._sample(*wanted)  # before `_done` is looked up: _write replaces it
        self._done.append(come)
        self._barren = 0
        continue
      except Failed as e:
        self._barren += 1
        alive = self._client.answered > answered or (skip and await self._alive())
        if not (skip and alive and self._barren < HOPELESS):
          raise self._stopped(e) from e
        self.rejected[wanted] = f"the server {e}"
      except Refused as e:
        self.rejected[wanted] = str(e)
        hopeless = not (self._finished.rows or self._done) and len(self.rejected) >= HOPELESS
        if hopeless or not skip:
          raise InputError(
            f"sample {wanted[1]} of prompt {wanted[0]}: {e}; mend the prompt or the config"
            + ("" if skip else ", or set generate.on_bad=skip")
          ) from e
      self._left -= 1

  async def _sample(self, prompt: int, sample: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the row of samples.jsonl, the line of responses.jsonl)."""
    said, top = self._prompts.said[prompt][0], self._config.generate.server.top_logprobs

    def read(answer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
      row, content = openai_api.read(answer, self._config.generate.stop)
      if top and content is None:
        raise InputError(
          f"{self._served.model} is served without log-probabilities; set "
          "generate.server.top_logprobs=0"
        )
      line: dict[str, Any] = {"id": prompt, "sample": sample}
      if top:
        line |= {k: v for k, v in answer.items() if k != "id"}
        line["choices"] = [answer["choices"][0] | {"logprobs": {"content": content}}]
        line["prompt_token_ids"] = self._ids.of(said, answer)
      return {"prompt": prompt, "sample": sample, "model": self._served.model, **row}, line

    path, body = openai_api.request(self._config, self._served, said, prompt, sample)
    return await self._client.ask(path, body, f"{prompt}/{sample}", read)

  def _write(self) -> None:
    """Puts on disk what has come."""
    done, self._done = self._done, []
    if self._config.generate.server.top_logprobs:
      self._responses.add([line for _, line in done])
    rows = [row for row, _ in done]
    self._finished.add(rows, [{} for _ in rows])
    self._left -= len(rows)
    self._tokens += sum(row["token_count"] for row in rows)
    self.retried = self._client.retried
    rate = self._tokens / (time.perf_counter() - self._start)
    self._progress.add(len(rows), tokens_per_second=rate, retried=self.retried)

  def _stopped(self, why: Failed) -> InputError:
    self._write()
    return InputError(
      f"the server at {self._config.generate.server.url} {why}; {len(self._finished.rows)} samples "
      f"are kept in {self._folder} and {self._left} are left, so see to the server and run the "
      "same command again"
    )
