"""The two ways in which a request to a server fails."""

from __future__ import annotations


class RequestRefused(Exception):
  """The server does not answer such a request, however often it is made."""


class RequestFailed(Exception):
  """A request was not answered; made again, it may be.

  Attributes:
    busy: the server has too much to do, and nothing is wrong.
    after: seconds that it asks to wait.
  """

  def __init__(self, why: str, busy: bool = False, after: float = 0.0):
    super().__init__(why)
    self.busy, self.after = busy, after
