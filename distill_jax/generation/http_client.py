"""A client of OpenAI-compatible servers: many requests at once, each made until it is answered.

What may pass is waited out: timeouts, cut connections, answers that cannot be read, statuses
408, 409, 425, 429 and from 500 on, after waits that grow. What will not pass is named at once.
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
from typing import Any

import httpx2

from distill_jax.errors import InputError
from distill_jax.generation.options import ServerOptions

AGAIN = (408, 409, 425, 429)  # and from 500 on: what the same request may get past
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0  # before a request is made again
PATIENCE_S = 600.0  # the longest wait that a server may ask for


class Refused(Exception):
  """The server wants no such request, however often it is made."""


class Failed(Exception):
  """A request has come to nothing; made again, it may come to something.

  Attributes:
    busy: the server has too much to do, and nothing is wrong.
    after: seconds that it asks to wait.
  """

  def __init__(self, why: str, busy: bool = False, after: float = 0.0):
    super().__init__(why)
    self.busy, self.after = busy, after


class Client:
  """Asks a server many things at once, patiently; an async context manager.

  Attributes:
    answered, retried: how many requests.
  """

  def __init__(self, server: ServerOptions, seed: int):
    self.answered = self.retried = 0
    self._server, self._seed = server, seed
    self._url, self._key = server.url.rstrip("/"), _key(server.api_key_env)
    self._next = 0.0  # when the next request may be made
    most = httpx2.Limits(
      max_connections=server.in_flight, max_keepalive_connections=server.in_flight
    )
    headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
    self._http = httpx2.AsyncClient(headers=headers, limits=most, timeout=None)

  async def __aenter__(self) -> Client:
    return self

  async def __aexit__(self, *_: object) -> None:
    await self._http.aclose()

  async def ask(self, path: str, body: Any, name: str, read: Callable[[Any], Any]) -> Any:
    """`read` of the answer to a request, which is made until it has one that can be read.

    Args:
      body: what is posted; None: nothing is, it is a GET.
      name: of the request; the waits between its repetitions are a function of it.
      read: raises KeyError, IndexError, TypeError, AttributeError or ValueError for an answer
        that is none.

    Raises:
      Failed: it has been made `retries` times again.
      Refused: it cannot be answered.
      InputError: none can, or `read` says so.
    """
    attempt, answered = 0, self.answered
    while True:
      try:
        said = read(await self._once(path, body))
      except Failed as e:
        failed = e
      except (KeyError, IndexError, TypeError, AttributeError, ValueError) as e:
        if isinstance(e, InputError):
          raise
        failed = Failed(f"gives an answer that cannot be read ({type(e).__name__}: {e})")
      else:
        self.answered += 1
        return said
      # Who is told to wait while others are answered has only lost a race.
      attempt += not (failed.busy and self.answered > answered)
      answered = self.answered
      if attempt > self._server.retries:
        raise Failed(f"{failed}, {attempt} times in a row") from failed
      self.retried += 1
      part = 0.5 + random.Random(f"{self._seed}/{name}/{attempt}").random() / 2
      wait = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** max(attempt - 1, 0))
      await asyncio.sleep(failed.after + part * wait)

  async def _once(self, path: str, body: Any) -> Any:
    await self._turn()
    try:
      async with asyncio.timeout(self._server.timeout_s):
        verb = "GET" if body is None else "POST"
        response = await self._http.request(verb, f"{self._url}/{path}", json=body)
    except TimeoutError as e:
      raise Failed(f"has not answered within {self._server.timeout_s:g} s") from e
    except httpx2.RequestError as e:
      why = self._safe(f"{type(e).__name__} {e}".strip())
      raise Failed(f"cannot be reached, or breaks off ({why})") from e
    status = response.status_code
    if status == 200:
      return response.json()
    what = f"{status} {' '.join(self._safe(response.text).split())[:300]}".strip()
    if status in AGAIN or status >= 500:
      raise Failed(f"answers {what}", status == 429, self._hold(_retry_after(response), what))
    if status in (401, 403):
      holds = f"in environment variable {self._server.api_key_env}" if self._key else "(none)"
      raise InputError(
        f"the server at {self._url} does not take the key {holds}: it answers {what}; name the "
        "right variable in generate.server.api_key_env"
      )
    if body is not None and (status in (404, 405) or status < 400):
      raise InputError(
        f"the server at {self._url} answers {what} to {path}; generate.server.url ends in /v1 as a "
        "rule, and generate.server.model is a name that is served there"
      )
    raise Refused(f"the server answers {what}")

  async def _turn(self) -> None:
    """Waits until another request may be made."""
    per_minute, now = self._server.requests_per_minute, time.monotonic()
    at = max(now, self._next)
    self._next = at + (60 / per_minute if per_minute else 0.0)
    await asyncio.sleep(at - now)

  def _hold(self, after: float, what: str) -> float:
    """No request at all is made before the time that a server asks for is over."""
    if after > PATIENCE_S:
      raise InputError(
        f"the server at {self._url} answers {what} and asks to wait {after:.0f} s; what is "
        "finished is kept, so run the same command again then"
      )
    self._next = max(self._next, time.monotonic() + after) if after else self._next
    return after

  def _safe(self, text: str) -> str:
    """Servers may repeat what they were sent; the key goes into no message."""
    return text.replace(self._key, "***") if self._key else text


def _key(variable: str) -> str:
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
  """Seconds: the header has a number of them or a date."""
  text = response.headers.get("Retry-After", "")
  if re.fullmatch(r"\d+(\.\d+)?", text):
    return float(text)
  with contextlib.suppress(ValueError):
    return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
  return 0.0
