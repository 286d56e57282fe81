"""Streamed responses of OpenAI-compatible servers, put together as if they were not streamed."""

from __future__ import annotations

import collections
import json
from typing import Any

from distill_jax.types import JsonObject

DONE = b"[DONE]"  # the data of the last event
JOINED = ("token_ids",)  # lists of a choice that are continued by each event
STARTS = (b"data:", b"event:", b"id:", b"retry:", b":")  # of the lines of a stream


def parse(raw: bytes) -> Any:
  """Returns the JSON of a response, which may be a stream of events.

  Args:
    raw: The whole body of the response. Servers that ignore `stream` send one JSON object.

  Raises:
    ValueError: If the body is neither.
  """
  if not raw.lstrip().startswith(STARTS):
    return json.loads(raw)
  return _join([json.loads(data) for data in _events(raw)])


def _events(raw: bytes) -> list[bytes]:
  """Returns the data of each event. Servers of this API send an event's data on one line."""
  found = []
  for line in raw.splitlines():
    if line.startswith(b"data:"):
      data = line.removeprefix(b"data:").strip()
      if data == DONE:
        break
      found.append(data)
  return found


def _join(events: list[JsonObject]) -> JsonObject:
  """Returns one response from its events; the last value of a field counts, unless it is null."""
  answer: JsonObject = {}
  choices: list[JsonObject] = []
  for event in events:
    choices += event.get("choices") or []
    answer |= {k: v for k, v in event.items() if k != "choices" and v is not None}
  if choices:
    answer["choices"] = [_join_choices(choices)]
  return answer


def _join_choices(choices: list[JsonObject]) -> JsonObject:
  """Returns one choice from the parts of it in each event."""
  choice: JsonObject = {}
  texts: dict[str, list[str]] = collections.defaultdict(list)
  message: dict[str, list[str]] = collections.defaultdict(list)
  lists: dict[str, list[Any]] = collections.defaultdict(list)
  logprobs: dict[str, list[Any]] = collections.defaultdict(list)
  is_chat = False
  for part in choices:
    for name, value in part.items():
      if value is None:  # that a field is there counts: a stop_reason of null is an end token
        choice.setdefault(name)
        continue
      if name == "delta":
        is_chat = True
        for key, text in value.items():
          if isinstance(text, str) and key != "role":
            message[key].append(text)
      elif name == "text":
        texts[name].append(value)
      elif name == "logprobs":
        for key, values in value.items():
          logprobs[key] += values or []
      elif name in JOINED:
        lists[name] += value
      else:
        choice[name] = value
  choice |= {name: "".join(parts) for name, parts in texts.items()} | lists
  if logprobs:
    choice["logprobs"] = dict(logprobs)
  if is_chat:
    choice["message"] = {"content": None} | {key: "".join(x) for key, x in message.items()}
  return choice
