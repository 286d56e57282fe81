"""The servers of a model: requests go to the one with the fewest requests in flight."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence

from distill_jax.generation.request_errors import RequestFailed

FIRST_WAIT_S, MAX_WAIT_S = 0.5, 60.0  # first and maximum wait before a retry, in seconds
FAILURES = 3  # consecutive failures after which a server is skipped; one if it is unreachable


@dataclasses.dataclass(eq=False)
class Server:
  """A server.

  Attributes:
    url: The address, without a slash at the end.
    in_flight: The number of requests in flight.
    failures: The number of consecutive failures.
    is_out: True if it is skipped, except for one request from time to time.
    ready: The time, of time.monotonic, from which on it may get requests.
  """

  url: str
  in_flight: int = 0
  failures: int = 0
  is_out: bool = False
  ready: float = 0.0


class Servers:
  """Chooses a server for each request.

  A server that fails is skipped for a time that grows up to MAX_WAIT_S; then it gets one request,
  and all others if that is answered.

  Args:
    urls: The addresses.

  Attributes:
    all: The servers.
  """

  def __init__(self, urls: Sequence[str]):
    self.all = [Server(url.rstrip("/")) for url in urls]

  @property
  def names(self) -> str:
    """The addresses as the subject of a sentence: "The server at URL" or "The servers at …"."""
    urls = ", ".join(server.url for server in self.all)
    return f"The server{'s' * (len(self.all) > 1)} at {urls}"

  def ready(self) -> list[Server]:
    """Returns the servers that may get a request now."""
    now = time.monotonic()
    return [server for server in self.all if server.ready <= now]

  async def take(self, failed_at: Mapping[Server, int]) -> Server:
    """Returns the server for a request, as soon as there is one.

    It is the one with the fewest requests in flight, among those at which the request has failed
    least often: a server that fails at once has few requests in flight and would get each again.

    Args:
      failed_at: The number of times that the request has failed, by server.
    """
    while not (ready := self.ready()):
      await asyncio.sleep(max(0.0, min(s.ready for s in self.all) - time.monotonic()))
    server = min(ready, key=lambda s: (failed_at.get(s, 0), s.in_flight))
    if server.is_out:  # others wait for the answer to this request
      server.ready = time.monotonic() + retry_wait(server.failures)
    return server

  def others_work(self, server: Server) -> bool:
    """Returns True if a server is skipped and another one is not."""
    return server.is_out and not all(s.is_out for s in self.all)

  def answered(self, server: Server) -> None:
    """Notes that a server has answered."""
    if server.is_out:
      print(f"{server.url} answers again.", file=sys.stderr)
      server.ready = 0.0
    server.failures, server.is_out = 0, False

  def failed(self, server: Server, failure: RequestFailed) -> None:
    """Notes a failure, and skips the server if there are others that may work."""
    if failure.busy:
      return
    server.failures += 1
    if len(self.all) == 1 or (server.failures < FAILURES and not failure.unreachable):
      return
    wait = retry_wait(server.failures)
    server.ready = max(server.ready, time.monotonic() + wait)
    if not server.is_out:
      print(f"{server.url} {failure}. It is skipped for a while.", file=sys.stderr)
    server.is_out = True


def retry_wait(failures: int) -> float:
  """Returns the wait after a number of consecutive failures, in seconds."""
  return min(MAX_WAIT_S, FIRST_WAIT_S * 2.0 ** max(failures - 1, 0))
