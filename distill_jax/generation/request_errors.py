"""Exceptions of requests to servers."""

from __future__ import annotations


class RequestRefused(Exception):
  """The server rejects a request permanently. The message is a sentence."""


class RequestFailed(Exception):
  """A request failed, but may succeed if it is repeated.

  Args:
    why: The reason, as a predicate of the server, e.g. "cannot be reached".
    busy: True if the server is only overloaded.
    after: The time in seconds after which the server asks to repeat the request.
    timed_out: True if the response took too long or broke off without an end.
    unreachable: True if there is no connection to the server.

  Attributes:
    busy: See Args.
    after: See Args.
    timed_out: See Args.
    unreachable: See Args.
  """

  def __init__(
    self,
    why: str,
    *,
    busy: bool = False,
    after: float = 0.0,
    timed_out: bool = False,
    unreachable: bool = False,
  ):
    super().__init__(why)
    self.busy, self.after = busy, after
    self.timed_out, self.unreachable = timed_out, unreachable
