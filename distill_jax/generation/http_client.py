"""A client for OpenAI-compatible servers that makes concurrent requests and retries them.

Transient faults are retried with exponential backoff: timeouts, broken connections, responses that
cannot be parsed, and the statuses 408, 409, 425, 429 and 5xx. Other errors are raised at once.
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

from distill_jax.errors import InputError, bad_value
from distill_jax.generation.options import ServerOptions
from distill_jax.generation.request_errors import RequestFailed, RequestRefused
from distill_jax.runtime import extras

with extras.needed("serve"):
  import httpx2

Answer = TypeVar("Answer")

RETRY_STATUSES = (408, 409, 425, 429)  # statuses that are retried, in addition to 5xx
FIRST_WAIT_S, MAX_WAIT_S = 0.5, 60.0  # first and maximum wait before a retry, in seconds
MAX_SERVER_WAIT_S = 600.0  # maximum wait that a server may request, in seconds


class Client:
  """A client of one server; an async context manager.

  Args:
    server: The server.
    seed: The seed for the random parts of waits.

  Attributes:
    answered: The number of answered requests.
    retried: The number of retries.

  Raises:
    InputError: If the environment variable server.api_key_env has no key.
  """

  def __init__(self, server: ServerOptions, seed: int):
    self.answered = self.retried = 0
    self._server, self._seed = server, seed
    self._url, self._key = server.url.rstrip("/"), _read_key(server.api_key_env)
    self._next = 0.0  # time at which the next request may be made
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
    """Makes a request, with retries, and returns its parsed response.

    Args:
      path: The path after the server's URL.
      body: The JSON body of a POST. None: a GET.
      name: The name of the request, which determines the random parts of its waits.
      parse: Parses the JSON of the response. It raises KeyError, IndexError, TypeError,
        AttributeError or ValueError for a malformed response.

    Raises:
      RequestFailed: If the request still fails after the maximum number of retries.
      RequestRefused: If the server rejects the request.
      InputError: If the server would reject every request, or if `parse` raises it.
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
        failed = RequestFailed(f"sent an invalid response ({type(e).__name__}: {e})")
      else:
        self.answered += 1
        return answer
      # A busy server that answers other requests meanwhile does not count as a failed attempt.
      attempt += not (failed.busy and self.answered > answered)
      answered = self.answered
      if attempt > self._server.retries:
        raise RequestFailed(f"{failed}, {attempt} times in a row") from failed
      self.retried += 1
      part = 0.5 + random.Random(f"{self._seed}/{name}/{attempt}").random() / 2
      wait = min(MAX_WAIT_S, FIRST_WAIT_S * 2 ** max(attempt - 1, 0))
      await asyncio.sleep(failed.after + part * wait)

  async def _send(self, path: str, body: Any) -> Any:
    """Makes a request once and returns the JSON of the response."""
    await self._wait_for_turn()
    try:
      async with asyncio.timeout(self._server.timeout_s):
        verb = "GET" if body is None else "POST"
        response = await self._http.request(verb, f"{self._url}/{path}", json=body)
    except TimeoutError as e:
      raise RequestFailed(f"did not answer within {self._server.timeout_s:g} s") from e
    except httpx2.RequestError as e:
      why = self._without_key(f"{type(e).__name__} {e}".strip())
      raise RequestFailed(f"cannot be reached or closed the connection ({why})") from e
    if response.status_code == 200:
      return response.json()
    raise self._error(path, body, response)

  def _error(
    self, path: str, body: Any, response: httpx2.Response
  ) -> RequestFailed | RequestRefused | InputError:
    """Returns the error for a response with a status other than 200."""
    status = response.status_code
    answer = f"{status} {' '.join(self._without_key(response.text).split())[:300]}".strip()
    if status in RETRY_STATUSES or status >= 500:
      after = self._hold(_retry_after(response), answer)
      return RequestFailed(f"responds with {answer}", busy=status == 429, after=after)
    if status in (401, 403):
      key = f"the key in {self._server.api_key_env}" if self._key else "requests without a key"
      return InputError(
        f"The server at {self._url} rejects {key} ({answer}). Set generate.server.api_key_env to "
        "the environment variable that contains the server's key."
      )
    if body is not None and (status in (404, 405) or status < 400):
      return InputError(
        f"The server at {self._url} responds to {path} with {answer}. Check generate.server.url, "
        "which usually ends in /v1, and generate.server.model."
      )
    return RequestRefused(f"The server responds with {answer}.")

  async def _wait_for_turn(self) -> None:
    """Waits until the next request may be made."""
    per_minute, now = self._server.requests_per_minute, time.monotonic()
    start = max(now, self._next)
    self._next = start + (60 / per_minute if per_minute else 0.0)
    await asyncio.sleep(start - now)

  def _hold(self, after: float, answer: str) -> float:
    """Delays all requests by the time that the server asks to wait, and returns that time.

    Raises:
      InputError: If the time exceeds MAX_SERVER_WAIT_S.
    """
    if after > MAX_SERVER_WAIT_S:
      raise InputError(
        f"The server at {self._url} responds with {answer} and asks to wait {after:.0f} s. "
        "Finished samples are kept; run the same command again after that time."
      )
    self._next = max(self._next, time.monotonic() + after) if after else self._next
    return after

  def _without_key(self, text: str) -> str:
    """Replaces the API key in a server's text, so that messages never contain it."""
    return text.replace(self._key, "***") if self._key else text


def _read_key(variable: str) -> str:
  if not variable:
    return ""
  key = os.environ.get(variable, "").strip()
  if not key or not key.isascii() or not key.isprintable():
    raise bad_value(
      "generate.server.api_key_env",
      variable,
      "an environment variable that contains a key",
      f"Set the environment variable {variable}",
    )
  return key


def _retry_after(response: httpx2.Response) -> float:
  """Returns the seconds to wait from the header Retry-After, a number of seconds or a date."""
  text = response.headers.get("Retry-After", "")
  if re.fullmatch(r"\d+(\.\d+)?", text):
    return float(text)
  with contextlib.suppress(ValueError):
    return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
  return 0.0
