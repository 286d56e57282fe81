"""A client that asks servers for the log-probabilities of texts, whatever their API."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Callable
from typing import Any

from distill_jax.generation import served_model
from distill_jax.generation.http_client import Answer, Client
from distill_jax.generation.options import ServerOptions
from distill_jax.generation.served_model import ServedModel
from distill_jax.generation.servers import Server
from distill_jax.records.import_logprobs import Document
from distill_jax.served import requests
from distill_jax.served.requests import PROMPT_LOGPROBS, SGLANG, Text
from distill_jax.types import JsonObject


class ScoringClient:
  """A client of the servers of one teacher. Call `open` or `use` first.

  Args:
    server: The options of the servers.
    k: Number of the most probable tokens to ask for; 0 for the text's own tokens alone.
    vocab_size: Number of tokens of the vocabulary.
    seed: The seed for the random parts of waits.

  Attributes:
    http: The client of the servers.
    model: The model, once it is open.
    method: The method by which texts are scored; see requests.py.
  """

  def __init__(self, server: ServerOptions, k: int, vocab_size: int, seed: int):
    self.http = Client(server, seed)
    self.method = PROMPT_LOGPROBS
    self.k = k
    self._server, self._vocab_size = server, vocab_size
    # Requests wait here, so that the time before they are sent is not part of their timeout.
    self._slots = asyncio.Semaphore(server.in_flight)
    self._numbers = itertools.count()

  async def open(self) -> ServedModel:
    """Finds the model.

    Raises:
      InputError: The servers have different models, or several and none is named.
      RequestFailed: No server answers.
    """
    self.use(await served_model.find(self.http, self._server.model))
    return self.model

  def use(self, model: ServedModel) -> None:
    """Sets the model, which is found already."""
    self.model = model
    self.method = SGLANG if model.server == "sglang" else PROMPT_LOGPROBS

  async def close(self) -> None:
    await self.http.__aexit__()

  async def score(
    self,
    text: Text,
    method: str = "",
    server: Server | None = None,
    retries: int | None = None,
    k: int | None = None,
  ) -> Document:
    """Returns the scored tokens of a text; see `requests.parse`.

    Args:
      text: The text.
      method: The method; "" for `method` of the client.
      server: The server to ask; None for any.
      retries: See Client.request.
      k: Number of the most probable tokens; None for `k` of the client.

    Raises:
      RequestFailed, RequestRefused, InputError: See Client.request.
    """
    method, k = method or self.method, self.k if k is None else k
    path, body = requests.request(method, self.model.name, text, k)
    parse = functools.partial(requests.parse, method, text=text, vocab_size=self._vocab_size)
    return await self._ask(path, body, parse, server, retries)

  async def tokens(self, text: str) -> list[int]:
    """Returns the tokens of a text as the server tokenizes it. It may put a BOS before them."""
    path, body = requests.request_of_text(self.method, self.model.name, text)
    return await self._ask(path, body, functools.partial(requests.tokens_of, self.method))

  async def chat(self, messages: list[JsonObject]) -> tuple[int, list[int] | None]:
    """Returns the number of tokens of a chat in the server's template, and the tokens.

    They end where the assistant's next message begins; None if the server does not return them.
    """
    body = {
      "model": self.model.name,
      "messages": messages,
      "max_tokens": 1,
      "temperature": 1.0,
      "return_token_ids": True,
      "stream": False,
    }

    def parse(answer: Any) -> tuple[int, list[int] | None]:
      ids = answer.get("prompt_token_ids") or answer["choices"][0].get("prompt_token_ids")
      return (len(ids), ids) if ids else (int(answer["usage"]["prompt_tokens"]), None)

    return await self._ask("chat/completions", body, parse)

  async def _ask(
    self,
    path: str,
    body: JsonObject,
    parse: Callable[[Any], Answer],
    server: Server | None = None,
    retries: int | None = None,
  ) -> Answer:
    body = {k: v for k, v in (body | self._server.extra).items() if v is not None}
    async with self._slots:
      name = str(next(self._numbers))
      return await self.http.request(path, body, name, parse, server, retries)
