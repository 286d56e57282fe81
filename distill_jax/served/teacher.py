"""A teacher on servers, which scores rows as `LoadedTeacher` does on the devices.

Rows are scored concurrently and yielded in order. Memory holds the rows whose texts are at the
servers and those that wait for an earlier one: AHEAD times `in_flight` rows, of which each takes
8 bytes per position and entry, e.g. 42 MB for 64 rows of 4,096 positions with 20 entries.

Every process sends the rows of the shards that it writes, and has an equal part of the requests.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import functools
import json
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future
from typing import Any, TypeVar

import jax
import numpy as np

from distill_jax.config import Config
from distill_jax.data import corpus as corpus_lib
from distill_jax.errors import InputError, Unavailable, bad_value, check_choice
from distill_jax.generation import server_checks
from distill_jax.generation.http_client import RequestFailed, RequestRefused
from distill_jax.generation.served_model import ServedModel
from distill_jax.hub.pretrained import Pretrained
from distill_jax.nn.sharding import Rows
from distill_jax.records import batch_plan, recording, served_store
from distill_jax.records.fields import LABEL_LOGP, TEXT, Record
from distill_jax.records.job import Part
from distill_jax.records.recording import Corpus
from distill_jax.records.store import unfinished_store
from distill_jax.runtime import distributed
from distill_jax.served import probes, row_texts
from distill_jax.served.requests import Text
from distill_jax.served.scoring_client import ScoringClient
from distill_jax.types import JsonObject

KINDS = ("topk", "labels")  # of the records that servers can give
AHEAD = 2  # rows that are scored or wait for an earlier one, per request in flight

Result = TypeVar("Result")


class ServedTeacher:
  """A teacher on servers; a context manager.

  Args:
    config: The config: the servers, the options of `records`, the tokenizer, and the seed.
    pretrained: The checkpoint whose tokenizer and chat template the rows have, unless
      data.tokenizer names others; None for random weights.
    is_chat: True if the rows are chats in the form of the chat template.

  Raises:
    InputError: The servers' options are invalid, or servers cannot give what is to be recorded.
  """

  on_devices = False  # see job.Teacher

  def __init__(self, config: Config, pretrained: Pretrained | None, is_chat: bool):
    server, count = config.generate.server, jax.process_count()
    tokenizer = corpus_lib.tokenizer_of(config.data, pretrained)
    template = corpus_lib.template_of(config.data, pretrained) if is_chat else None
    _check_options(config)
    own = dataclasses.replace(
      server,
      in_flight=-(-server.in_flight // count),
      requests_per_minute=server.requests_per_minute / count,
    )
    options = dataclasses.replace(config.records, served=True)
    self._spec = recording.record_spec(options, tokenizer.vocab_size)
    self._tokenizer, self._template = tokenizer, template
    self._server, self._limit, self._ahead = server, server.max_disagreement, AHEAD * own.in_flight
    self._client = ScoringClient(own, self._spec.n, tokenizer.vocab_size, config.seed)
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

  def __enter__(self) -> ServedTeacher:
    self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._start(self._stop()).result()
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join()
    self._loop.close()

  @functools.cached_property
  def identity(self) -> JsonObject:
    """Name and digest of the teacher, for the manifest of a store.

    The servers give the name unless generate.server.model is set.

    Raises:
      InputError: The servers have different models, or several.
      Unavailable: No server answers.
    """
    return served_store.identity(self._server.model or self._open().name)

  def _open(self) -> ServedModel:
    """Returns the model, which process 0 finds. All processes call it, and raise its error."""
    found = ""

    def find() -> None:
      nonlocal found
      found = json.dumps(dataclasses.asdict(self._wait(self._client.open())))

    distributed.run_on_process_0(find)
    model = ServedModel(**json.loads(distributed.text_of_process_0(found)))
    self._client.use(model)
    return model

  def check(self, parts: Sequence[Part]) -> None:
    """Checks that the servers can score the rows of stores. Every process must call it first.

    No request is made if nothing is missing.

    Args:
      parts: The stores. A row that one of them holds is scored again, and compared.

    Raises:
      InputError: The servers have another tokenizer, template, vocabulary or model, disagree with
        each other, or do not give the log-probabilities.
      Unavailable: No server answers.
    """
    missing = [part for part in parts if part.missing]
    if missing:
      self._check(lambda: _row_of(missing[0]))

  def check_before(self, positions: int) -> None:
    """Makes the checks of `check` before there are rows, of this number of positions."""
    self._check(lambda: dict.fromkeys(TEXT, np.zeros(positions, np.int32)))

  def _check(self, row: Callable[[], Record]) -> None:
    self._open()
    method = ""

    def probe() -> None:
      nonlocal method
      method = self._wait(self._probe(row()))

    distributed.run_on_process_0(probe)
    self._client.method = distributed.text_of_process_0(method)

  async def _probe(self, row: Record) -> str:
    """Makes the requests of probes.py, and returns the method of scoring texts."""
    client, stored = self._client, None
    await probes.check_length(client, len(row["tokens_T"]))
    await probes.check_tokenizer(client, self._tokenizer)
    if self._template is not None:
      await probes.check_chat(client, self._tokenizer, self._template)
    if places := row_texts.texts_of(row):
      place = max(places, key=lambda p: len(p.text.tokens))
      text = place.text
      if LABEL_LOGP.read in row:
        at = place.positions
        stored = np.where(row["mask_T"][at], row[LABEL_LOGP.read][at], np.nan)
    else:
      text = Text(self._tokenizer.encode(probes.PROSE)[: len(row["tokens_T"])], 1)
    await probes.check_agreement(client, text, self._limit, stored)
    return client.method if client.k else await probes.choose_method(client, text, self._limit)

  def recorded(
    self, corpus: Corpus, plan: Iterable[np.ndarray], rows: Rows, on_statistics: object = None
  ) -> Iterator[tuple[np.ndarray, list[Record]]]:
    """Yields each batch of a plan with the records in it that this process writes.

    Batches are yielded in order, while later ones are scored. It has the interface of
    LoadedTeacher.recorded.

    Args:
      corpus: The corpus, of text.
      plan: The batches, from `batch_plan.batches`.
      rows: The rows of a batch.
      on_statistics: Not used; there are no rows of a student with another tokenizer.

    Raises:
      InputError: A server refuses a text, or its response cannot be used.
      Unavailable: No server answers.
      Preempted: SIGTERM arrived while no server answered; only in a run of one process.
    """
    waiting: collections.deque[tuple[np.ndarray, list[Future[Record]]]] = collections.deque()
    for index_B in plan:
      own = corpus.read(batch_plan.written(index_B, rows))
      waiting.append((index_B, [self._start(self._record(row)) for row in own]))
      while sum(len(started) for _, started in waiting) > self._ahead:
        yield self._next(waiting)
    while waiting:
      yield self._next(waiting)

  def _next(
    self, waiting: collections.deque[tuple[np.ndarray, list[Future[Record]]]]
  ) -> tuple[np.ndarray, list[Record]]:
    index_B, started = waiting.popleft()
    return index_B, [self._result(future) for future in started]

  async def _record(self, row: Record) -> Record:
    """Returns a row with its targets."""
    places = row_texts.texts_of(row)
    documents = await asyncio.gather(*(self._client.score(place.text) for place in places))
    return row_texts.with_targets(row, zip(places, documents, strict=True), self._spec)

  async def _stop(self) -> None:
    """Cancels all requests and closes the connections."""
    requests = asyncio.all_tasks() - {asyncio.current_task()}
    for request in requests:
      request.cancel()
    await asyncio.gather(*requests, return_exceptions=True)
    await self._client.close()

  def _start(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
    return asyncio.run_coroutine_threadsafe(work, self._loop)

  def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
    return self._result(self._start(work))

  def _result(self, future: Future[Result]) -> Result:
    """Returns the result of work for the servers, with errors that end the run.

    Raises:
      InputError: A server refuses the request.
      Unavailable: No server answers.
      Preempted: SIGTERM arrived while no server answered.
    """
    try:
      while not future.done() and not distributed.Preemption.signalled():
        futures.wait([future], timeout=1.0)
      if not future.done():
        raise distributed.Preemption.stop("The scoring", "finished shards are kept")
      return future.result()
    except RequestFailed as e:
      raise Unavailable(
        f"{self._client.http.servers.names} {e}. Finished shards are kept. Check the server and "
        "run the same command again."
      ) from e
    except RequestRefused as e:
      raise InputError(
        f"{self._client.http.servers.names} refuses to score a text ({str(e).rstrip('.')}). "
        "Correct the texts, or the limits of the server."
      ) from e


def _row_of(part: Part) -> Record:
  """Returns a row of a store, with its targets if this process finds one that is recorded."""
  store = unfinished_store(part.writer)
  shards = store.manifest.shards
  return store[shards[0].first] if shards else part.corpus.rows[part.missing[0].start]


def _check_options(config: Config) -> None:
  """Raises InputError if servers cannot give what is to be recorded."""
  server_checks.check(config.generate.server)
  c, why = config.records, "for a teacher on servers"
  if not config.generate.server.urls:
    raise InputError(f"generate.server.urls is empty; expected an address {why}. Set it.")
  check_choice("records.kind", c.kind, KINDS, "Set it, since servers give log-probabilities alone")
  for name, value in (
    ("temperature", 1.0),
    ("nucleus", 1.0),
    ("taps", ()),
    ("student_tokenizer", ""),
    ("logprobs", ""),
  ):
    if (found := getattr(c, name)) != value:
      raise bad_value(f"records.{name}", found, f"{value!r} {why}", "Remove the key")
