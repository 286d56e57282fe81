"""The model that servers have, as they name it themselves."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from typing import Any

from distill_jax.errors import InputError, bad_value
from distill_jax.generation.http_client import Client
from distill_jax.generation.request_errors import RequestFailed, RequestRefused
from distill_jax.generation.servers import Server

EXTENDED_SERVERS = ("vllm", "sglang")  # values of `owned_by` of servers with more request fields


@dataclasses.dataclass(frozen=True)
class ServedModel:
  """A model on a server.

  Attributes:
    name: The model's name on the server.
    server: The kind of server: "vllm", "sglang", or "" for others.
    max_len: The maximum length of a text in tokens; 0 if the server does not tell. Servers of one
      model may differ in it.
  """

  name: str
  server: str = ""
  max_len: int = dataclasses.field(default=0, compare=False)

  @classmethod
  def from_answer(cls, answer: Any, name: str) -> ServedModel:
    """Returns a model from the response to the request `models`.

    Args:
      answer: The JSON of the response.
      name: The model's name. "": the only model of the server.

    Raises:
      InputError: If `name` is empty and the server does not have exactly one model.
    """
    found = {m["id"]: m for m in answer["data"]}
    if not name and len(found) != 1:
      models = f"one of the server's {len(found)} models ({', '.join([*found][:5])})"
      raise bad_value("generate.server.model", name, models, "Name the model")
    model = found.get(name or next(iter(found)), {})
    owner = model.get("owned_by")
    kind = owner if owner in EXTENDED_SERVERS else ""
    return cls(name or next(iter(found)), kind, int(model.get("max_model_len") or 0))


async def find(client: Client, name: str) -> ServedModel:
  """Returns the model of the servers that answer, with the smallest of their lengths.

  Args:
    client: The client of the servers.
    name: The model's name. "": the only model of a server.

  Raises:
    InputError: If the servers have different models, or several and none is named.
    RequestFailed: If no server answers.
  """
  servers = client.servers.all
  if len(servers) > 1:
    asked = (_model_of(client, name, server, retries=0) for server in servers)
    found = dict(zip(servers, await asyncio.gather(*asked, return_exceptions=True), strict=True))
    for error in found.values():
      if isinstance(error, BaseException) and not isinstance(error, RequestFailed):
        raise error
    models = {m: s.url for s, m in found.items() if isinstance(m, ServedModel)}
    if len(models) > 1:
      (a, at_a), (b, at_b), *_ = models.items()
      raise InputError(
        f"{at_a} serves {a.name} ({a.server or 'unknown software'}) and {at_b} serves {b.name} "
        f"({b.server or 'unknown software'}); expected the same. Correct generate.server.urls."
      )
    if models:
      answers = [m for m in found.values() if isinstance(m, ServedModel)]
      return min(answers, key=lambda m: m.max_len or float("inf"))
  return await _model_of(client, name, None, None)


async def _model_of(
  client: Client, name: str, server: Server | None, retries: int | None
) -> ServedModel:
  """Returns the model of a server; None: of any server."""
  parse = functools.partial(ServedModel.from_answer, name=name)
  try:
    return await client.request("models", None, "models", parse, server, retries)
  except RequestRefused as e:
    if not name:
      raise bad_value(
        "generate.server.model",
        name,
        f"a name, since the server does not list its models ({str(e).rstrip('.')})",
        "Name the model",
      ) from e
    return ServedModel(name)
