"""A client of OpenAI-compatible servers: many requests at once, each repeated until it is answered.

Transient faults are waited out, with waits that grow: timeouts, cut connections, answers that
cannot be parsed, statuses 408, 409, 425, 429 and from 500 on. Permanent ones are named at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import os
import random
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from distill_jax.errors import InputError
from distill_jax.generation.options import ServerOptions
from distill_jax.generation.request_errors import RequestFailed, RequestRefused
from distill_jax.runtime import extras

with extras.needed("serve"):
  import httpx2

Answer = TypeVar("Answer")

RETRY_STATUSES = (408, 409, 425, 429)  # and from 500 on: the same request may be answered yet
FIRST_WAIT_S, MAX_WAIT_S = 0.5, 60.0  # before a request is made again
MAX_SERVER_WAIT_S = 600.0  # that a server may ask for


class Client:
  """Makes many requests of a server at once, each repeatedly; an async context manager.

  Attributes:
    answered, retried: how many requests were.
  """

  def __init__(self, server: ServerOptions, seed: int):
    self.answered = self.retried = 0
    self._server, self._seed = server, seed
    self._url, self._key = server.url.rstrip("/"), _read_key(server.api_key_env)
    self._next = 0.0  # when the next request may be made
    limits = httpx2.Limits(
      max_connections=server.in_flight, max_keepalive_connections=server.in_flight
    )
    headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
    self._http = httpx2.AsyncClient(headers=headers, limits=limits, timeout=None)

  async def __aenter__(self) -> Client:
    return self

  async def __aexit__(self, *_: object) -> None:
    await self._http.aclose()

  async def request(
    self, path: str, body: Any, name: str, parse: Callable[[Any], Answer]
  ) -> Answer:
    """Makes a request until it has an answer that can be parsed, and returns that.

    Args:
      body: what is posted; None: a GET.
      name: of the request; the waits between its repetitions are a function of it.
      parse: raises KeyError, IndexError, TypeError, AttributeError or ValueError for an answer
        that is malformed.

    Raises:
      RequestFailed: it has been repeated `retries` times.
      RequestRefused: it cannot be answered.
      InputError: no request can be, or `parse` raises one.
    """
    attempt, answered = 0, self.answered
    while True:
      try:
        answer = parse(await self._send(path, body))
      except RequestFailed as e:
        failed = e
      except (KeyError, IndexError, TypeError, AttributeError, ValueError) as e:
        if isinstance(e, InputError):
          raise
        failed = RequestFailed(f"gives an answer that cannot be read ({type(e).__name__}: {e})")
      else:
        self.answered += 1
        return answer
      # A request refused as "busy" while others are answered has only lost a race.
      attempt += not (failed.busy and self.answered > answered)
      answered = self.answered
      if attempt > self._server.retries:
        raise RequestFailed(f"{failed}, {attempt} times in a row") from failed
      self.retried += 1
      part = 0.5 + random.Random(f"{self._seed}/{name}/{attempt}").random() / 2
      wait = min(MAX_WAIT_S, FIRST_WAIT_S * 2 ** max(attempt - 1, 0))
      await asyncio.sleep(failed.after + part * wait)

  async def _send(self, path: str, body: Any) -> Any:
    """Makes a request once, and returns the JSON of its answer."""
    await self._wait_for_turn()
    try:
      async with asyncio.timeout(self._server.timeout_s):
        verb = "GET" if body is None else "POST"
        response = await self._http.request(verb, f"{self._url}/{path}", json=body)
    except TimeoutError as e:
      raise RequestFailed(f"has not answered within {self._server.timeout_s:g} s") from e
    except httpx2.RequestError as e:
      why = self._without_key(f"{type(e).__name__} {e}".strip())
      raise RequestFailed(f"cannot be reached, or breaks off ({why})") from e
    if response.status_code == 200:
      return response.json()
    raise self._error(path, body, response)

  def _error(
    self, path: str, body: Any, response: httpx2.Response
  ) -> RequestFailed | RequestRefused | InputError:
    """What a status other than 200 means."""
    status = response.status_code
    answer = f"{status} {' '.join(self._without_key(response.text).split())[:300]}".strip()
    if status in RETRY_STATUSES or status >= 500:
      after = self._hold(_retry_after(response), answer)
      return RequestFailed(f"answers {answer}", busy=status == 429, after=after)
    if status in (401, 403):
      holds = f"in environment variable {self._server.api_key_env}" if self._key else "(none)"
      return InputError(
        f"the server at {self._url} does not take the key {holds}: it answers {answer}; name the "
        "right variable in generate.server.api_key_env"
      )
    if body is not None and (status in (404, 405) or status < 400):
      return InputError(
        f"the server at {self._url} answers {answer} to {path}; generate.server.url ends in /v1 "
        "as a rule, and generate.server.model is a name that is served there"
      )
    return RequestRefused(f"the server answers {answer}")

  async def _wait_for_turn(self) -> None:
    """Waits until another request may be made."""
    per_minute, now = self._server.requests_per_minute, time.monotonic()
    start = max(now, self._next)
    self._next = start + (60 / per_minute if per_minute else 0.0)
    await asyncio.sleep(start - now)

  def _hold(self, after: float, answer: str) -> float:
    """Makes no request at all before the time that a server asks for is over; returns it.

    Raises:
      InputError: the server asks for more than MAX_SERVER_WAIT_S.
    """
    if after > MAX_SERVER_WAIT_S:
      raise InputError(
        f"the server at {self._url} answers {answer} and asks to wait {after:.0f} s; what is "
        "finished is kept, so run the same command again then"
      )
    self._next = max(self._next, time.monotonic() + after) if after else self._next
    return after

  def _without_key(self, text: str) -> str:
    """Servers may repeat what they were sent; the key goes into no message."""
    return text.replace(self._key, "***") if self._key else text


def _read_key(variable: str) -> str:
  if not variable:
    return ""
  key = os.environ.get(variable, "").strip()
  if not key or not key.isascii() or not key.isprintable():
    raise InputError(
      f"environment variable {variable}, which generate.server.api_key_env names, holds no key; "
      "set it to the server's key"
    )
  return key


def _retry_after(response: httpx2.Response) -> float:
  """Seconds to wait: the header has a number of them, or a date."""
  text = response.headers.get("Retry-After", "")
  if re.fullmatch(r"\d+(\.\d+)?", text):
    return float(text)
  with contextlib.suppress(ValueError):
    return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
  return 0.0
