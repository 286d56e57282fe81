"""A client for OpenAI-compatible servers that makes concurrent requests and retries them.

Transient faults are retried with exponential backoff: broken connections, responses that cannot be
parsed, and the statuses 408, 409, 425, 429 and 5xx. Other errors are raised at once.

A response may take long: 32,768 tokens at 12 tokens per second are 45 minutes. So responses are
streamed, and time out on silence: after `silence_s` without a byte. The first byte may take longer
(`first_byte_s`), because the request waits in the server's queue, in the worst case as long as one
response takes, and because servers that ignore `stream` send nothing before the end. A timeout is
retried once: it has cost much, and a prompt that silences a server does so again.

In memory are the bytes of the responses in flight: about 250 B per token, and 2 KB with
20 log-probabilities.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import email.utils
import math
import os
import random
import re
import resource
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from distill_jax.errors import InputError, bad_value
from distill_jax.generation import event_stream
from distill_jax.generation.options import ServerOptions
from distill_jax.generation.request_errors import RequestFailed, RequestRefused
from distill_jax.generation.servers import Server, Servers, retry_wait
from distill_jax.runtime import extras

with extras.needed("serve"):
  import httpx2

Answer = TypeVar("Answer")

RETRY_STATUSES = (408, 409, 425, 429)  # statuses that are retried, in addition to 5xx
MAX_SERVER_WAIT_S = 600.0  # maximum wait that a server may request, in seconds
CONNECT_S = 20.0  # timeout of a connection, in seconds
TIMEOUTS = 2  # number of timeouts after which a request has failed
OTHER_FILES = 96  # open files of a run in addition to its connections, at most


class Response(NamedTuple):
  """A response.

  Attributes:
    status: The HTTP status.
    headers: The HTTP headers.
    body: The body.
  """

  status: int
  headers: Mapping[str, str]
  body: bytes

  @property
  def text(self) -> str:
    return self.body.decode(errors="replace")


class Client:
  """A client of the servers of one model; an async context manager.

  Args:
    options: The options of the servers.
    seed: The seed for the random parts of waits.

  Attributes:
    answered: The number of answered requests.
    retried: The number of retries.
    servers: The servers.

  Raises:
    InputError: If the environment variable server.api_key_env has no key, or there would be more
      connections than open files are allowed.
  """

  def __init__(self, options: ServerOptions, seed: int):
    self.answered = self.retried = 0
    self.servers = Servers(options.urls)
    self._options, self._seed = options, seed
    self._key = _read_key(options.api_key_env)
    self._next = 0.0  # time at which the next request may be made
    _allow_connections(options.in_flight)
    limits = httpx2.Limits(
      max_connections=options.in_flight, max_keepalive_connections=options.in_flight
    )
    headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
    timeout = httpx2.Timeout(None, connect=CONNECT_S)
    self._http = httpx2.AsyncClient(headers=headers, limits=limits, timeout=timeout)

  async def __aenter__(self) -> Client:
    return self

  async def __aexit__(self, *_: object) -> None:
    await self._http.aclose()

  async def request(
    self,
    path: str,
    body: Any,
    name: str,
    parse: Callable[[Any], Answer],
    server: Server | None = None,
    retries: int | None = None,
  ) -> Answer:
    """Makes a request, with retries, and returns its parsed response.

    Args:
      path: The path after the server's URL; with a slash at its beginning, the path on the server's
        host, without the /v1 at the end of the URL.
      body: The JSON body of a POST. None: a GET.
      name: The name of the request, which determines the random parts of its waits.
      parse: Parses the JSON of the response. It raises KeyError, IndexError, TypeError,
        AttributeError or ValueError for a malformed response.
      server: The server to ask. None: `servers` chooses one for each attempt.
      retries: The maximum number of retries. None: that of the options.

    Raises:
      RequestFailed: If the request still fails after the maximum number of retries, or after
        TIMEOUTS timeouts.
      RequestRefused: If the server rejects the request.
      InputError: If the server would reject every request, or if `parse` raises it.
    """
    retries = self._options.retries if retries is None else retries
    attempt = timeouts = 0
    answered, failed_at = self.answered, collections.Counter[Server]()
    while True:
      asked = server or await self.servers.take(failed_at)
      try:
        return await self._once(asked, path, body, parse)
      except RequestFailed as e:
        failed = e
      failed_at[asked] += 1
      # A busy server that answers other requests meanwhile does not count as a failed attempt, and
      # neither does a server that fails all requests while another one works.
      is_the_server = server is None and self.servers.others_work(asked)
      if not is_the_server and not (failed.busy and self.answered > answered):
        attempt, timeouts = attempt + 1, timeouts + failed.timed_out
      answered = self.answered
      if attempt > retries or timeouts >= TIMEOUTS:
        raise RequestFailed(
          f"{failed}, {attempt} times in a row", timed_out=failed.timed_out
        ) from failed
      self.retried += 1
      if server is None and any(failed_at[s] < failed_at[asked] for s in self.servers.ready()):
        continue  # another server may be able to answer
      part = 0.5 + random.Random(f"{self._seed}/{name}/{attempt}").random() / 2
      await asyncio.sleep(failed.after + part * retry_wait(attempt))

  async def _once(
    self, server: Server, path: str, body: Any, parse: Callable[[Any], Answer]
  ) -> Answer:
    """Makes a request once, and notes whether the server has answered."""
    server.in_flight += 1
    try:
      answer = parse(await self._send(server, path, body))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as e:
      if isinstance(e, InputError):
        raise
      failed = RequestFailed(f"sent an invalid response ({type(e).__name__}: {e})")
      self.servers.failed(server, failed)
      raise failed from e
    except RequestFailed as e:
      self.servers.failed(server, e)
      raise
    finally:
      server.in_flight -= 1
    self.answered += 1
    self.servers.answered(server)
    return answer

  async def _send(self, server: Server, path: str, body: Any) -> Any:
    """Makes a request once and returns the JSON of the response."""
    await self._wait_for_turn()
    try:
      response = await self._exchange(server, path, body)
    except httpx2.RequestError as e:
      why = self._without_key(f"{type(e).__name__} {e}".strip())
      raise RequestFailed(
        f"cannot be reached or closed the connection ({why})",
        unreachable=isinstance(e, (httpx2.ConnectError, httpx2.ConnectTimeout)),
      ) from e
    if response.status != 200:
      raise self._error(server, path, body, response)
    answer = event_stream.parse(response.body)
    if isinstance(answer, dict) and (error := answer.get("error")):
      raise self._error_in_answer(error)
    return answer

  async def _exchange(self, server: Server, path: str, body: Any) -> Response:
    """Makes a request and returns the response, unless the server is silent for too long."""
    options, clock, data = self._options, asyncio.get_running_loop().time, bytearray()
    verb, first = ("GET", options.silence_s) if body is None else ("POST", options.first_byte_s)
    end = clock() + options.timeout_s if options.timeout_s else math.inf
    try:
      async with (
        asyncio.timeout_at(min(end, clock() + first)) as limit,
        self._http.stream(verb, _address(server, path), json=body) as response,
      ):
        async for chunk in response.aiter_bytes():
          due = min(end, clock() + options.silence_s)
          if not data or due - (limit.when() or 0.0) > options.silence_s / 8:
            limit.reschedule(due)
          data += chunk
    except TimeoutError as e:
      if clock() >= end:
        why = f"did not finish a response within {options.timeout_s:g} s"
      elif data:
        why = f"sent nothing for {options.silence_s:g} s in the middle of a response"
      else:
        why = f"sent nothing for {first:g} s"
      raise RequestFailed(why, timed_out=True) from e
    return Response(response.status_code, response.headers, bytes(data))

  def _error(
    self, server: Server, path: str, body: Any, response: Response
  ) -> RequestFailed | RequestRefused | InputError:
    """Returns the error for a response with a status other than 200."""
    status = response.status
    answer = f"{status} {' '.join(self._without_key(response.text).split())[:300]}".strip()
    if status in RETRY_STATUSES or status >= 500:
      after = self._hold(server, _retry_after(response.headers), answer)
      return RequestFailed(f"responds with {answer}", busy=status == 429, after=after)
    if status in (401, 403):
      key = f"the key in {self._options.api_key_env}" if self._key else "requests without a key"
      return InputError(
        f"The server at {server.url} rejects {key} ({answer}). Set generate.server.api_key_env to "
        "the environment variable that contains the server's key."
      )
    if body is not None and (status in (404, 405) or status < 400):
      return InputError(
        f"The server at {server.url} responds to {path} with {answer}. Check generate.server.urls, "
        "which usually end in /v1, and generate.server.model."
      )
    return RequestRefused(f"The server responds with {answer}.")

  def _error_in_answer(self, error: Any) -> RequestFailed | RequestRefused:
    """Returns the error for a response, with status 200, that contains an error."""
    text = " ".join(self._without_key(str(error)).split())[:300]
    code = error.get("code") if isinstance(error, dict) else None
    if isinstance(code, int) and 400 <= code < 500 and code not in RETRY_STATUSES:
      return RequestRefused(f"The server responds with {text}.")
    return RequestFailed(f"sent an invalid response with the error {text}")

  async def _wait_for_turn(self) -> None:
    """Waits until the next request may be made."""
    per_minute, now = self._options.requests_per_minute, time.monotonic()
    start = max(now, self._next)
    self._next = start + (60 / per_minute if per_minute else 0.0)
    await asyncio.sleep(start - now)

  def _hold(self, server: Server, after: float, answer: str) -> float:
    """Delays requests to a server by the time that it asks to wait, and returns that time.

    Raises:
      InputError: If the time exceeds MAX_SERVER_WAIT_S.
    """
    if after > MAX_SERVER_WAIT_S:
      raise InputError(
        f"The server at {server.url} responds with {answer} and asks to wait {after:.0f} s. "
        "Finished samples are kept; run the same command again after that time."
      )
    server.ready = max(server.ready, time.monotonic() + after) if after else server.ready
    return after

  def _without_key(self, text: str) -> str:
    """Replaces the API key in a server's text, so that messages never contain it."""
    return text.replace(self._key, "***") if self._key else text


def _address(server: Server, path: str) -> str:
  if path.startswith("/"):
    return server.url.removesuffix("/v1") + path
  return f"{server.url}/{path}"


def _allow_connections(count: int) -> None:
  """Raises the limit of open files of this process, if it is needed and allowed.

  Raises:
    InputError: If it is not allowed.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  needed = count + OTHER_FILES
  if soft == resource.RLIM_INFINITY or needed <= soft:
    return
  try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
  except ValueError as e:
    limit = soft if hard == resource.RLIM_INFINITY else hard
    raise bad_value(
      "generate.server.in_flight",
      count,
      f"at most {limit - OTHER_FILES}, since this process may open {limit} files",
      "Reduce it, or raise the limit with `ulimit -n`",
    ) from e


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


def _retry_after(headers: Mapping[str, str]) -> float:
  """Returns the seconds to wait from the header Retry-After, a number of seconds or a date."""
  text = headers.get("Retry-After", "")
  if re.fullmatch(r"\d+(\.\d+)?", text):
    return float(text)
  with contextlib.suppress(ValueError):
    return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
  return 0.0
