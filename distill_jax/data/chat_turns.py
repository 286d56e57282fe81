"""The assistant's turns in a rendered chat, of templates that do not mark them.

A turn is what its rendering adds to the messages before it with a generation prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from distill_jax.data import sandboxed_jinja
from distill_jax.errors import InputError
from distill_jax.types import JsonObject

PROBE = "probe"  # a message's content, to see what a template writes around it

Message = Mapping[str, Any]
Draw = Callable[..., str]  # (messages, prompt=False) -> text


class Turn(NamedTuple):
  """The chat up to and with an assistant's message.

  Attributes:
    text: that part of the chat as it is written if nothing follows.
    span: the (start, end) of the assistant's part in `text`.
  """

  text: str
  span: tuple[int, int]


def prompted(draw: Draw, messages: Sequence[Message], where: str) -> str:
  """Returns the text of messages with the generation prompt for the assistant's next turn.

  Some templates need none: a turn follows the messages at once. Others ignore that a prompt is
  wanted, and write a header with the turn; those are refused.
  """
  text = draw(messages, prompt=True)
  if text != draw(messages):
    return text
  turn = draw([*messages, {"role": "assistant", "content": PROBE}])
  if not turn.startswith(text) or not turn[len(text) :].lstrip().startswith(PROBE):
    raise InputError(
      f"{where} writes no generation prompt, so nothing tells a model that its turn "
      "begins; use `add_generation_prompt` in it"
    )
  return text


class TurnFinder:
  """Finds the assistant's turns of one chat."""

  def __init__(self, draw: Draw, cut: re.Pattern[str], where: str):
    """Args:
    draw: renders messages of the chat.
    cut: splits a text at special tokens.
    where: whose template it is, for errors.
    """
    self._draw, self._cut, self._where = draw, cut, where

  def find(self, messages: Sequence[Message], i: int, text: str) -> Turn:
    """Finds the assistant's part of message i, from renderings of the chat that ends with it.

    It begins where the generation prompt for it ends. Where it ends depends on how the template
    writes the chat that ends with the message, `alone`, and the same with a generation prompt,
    `with_prompt`:

      the template                       told by                          the turn ends with
      writes a prompt after each turn    with_prompt = alone + prompt     alone
      writes no prompt after a turn      with_prompt = alone              alone, if it begins the
                                                                          chat with a next message
      writes the chat's end otherwise    neither                          what both begin with

    and there at the last special token, if only white space follows that.

    Args:
      messages: the whole chat.
      i: the number of the assistant's message.
      text: the whole chat, rendered.
    """
    before = prompted(self._draw, messages[:i], self._where)
    alone, with_prompt = self._draw(messages[: i + 1]), self._draw(messages[: i + 1], prompt=True)
    if not alone.startswith(before):
      raise self._unsure(i, "does not begin that turn as it begins its generation prompt")
    if with_prompt == alone:
      self._check_followed(messages, i, alone, text)
      stable = alone
    elif with_prompt.startswith(alone):
      stable = alone
    else:
      stable = self._without_chat_end(messages, i, alone, with_prompt)
    ends = [m.end() for m in self._cut.finditer(stable, len(before))]
    end = ends[-1] if ends and not stable[ends[-1] :].strip() else len(stable)
    self._check_whole(messages[i], i, before, alone[len(before) : end])
    return Turn(alone, (len(before), end))

  def _check_followed(self, messages: Sequence[Message], i: int, alone: str, text: str) -> None:
    """Refuses a turn that a next message changes, of a template without prompts after turns.

    Either it writes nothing after a turn, or always the next one's header, which the next message
    then follows.
    """
    followed = text.startswith(alone) and text != alone
    longer = text if followed else self._draw([*messages[: i + 1], _next(messages[i])])
    if not longer.startswith(alone):
      raise self._unsure(i, "ends that turn otherwise when a message follows")

  def _without_chat_end(
    self, messages: Sequence[Message], i: int, alone: str, with_prompt: str
  ) -> str:
    """Returns `alone` up to where the template writes the chat's end otherwise than a turn's.

    That is certain only if the prompt, as it is written before message i, is all that follows in
    `with_prompt`, and the turn has a special token.
    """
    before = prompted(self._draw, messages[:i], self._where)
    stable = _common(alone, with_prompt, self._cut)
    prompt = before[len(_common(before, self._draw(messages[:i]), self._cut)) :]
    if with_prompt != stable + prompt or not self._cut.search(stable, len(before)):
      raise self._unsure(i, "ends that turn otherwise when a prompt follows")
    return stable

  def _check_whole(self, message: Message, i: int, before: str, turn: str) -> None:
    """Refuses a turn that lacks some of the message; spaces and special tokens do not count.

    The message may begin within the prompt, such as an empty thought.
    """
    before, written = _bare(before, self._cut), _bare(turn, self._cut)
    for key in ("content", *sandboxed_jinja.REASONING):
      part = message.get(key)
      if isinstance(part, list):
        part = "".join(p["text"] for p in part if isinstance(p, dict) and p.get("type") == "text")
      part = _bare(part, self._cut) if isinstance(part, str) else ""
      if part not in before[len(before) - max(len(part) - 1, 0) :] + written:
        raise self._unsure(i, f"leaves out or changes some of its {key}")
    for call in message.get("tool_calls") or []:
      name = str(_function(call).get("name"))
      if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", turn):
        raise self._unsure(i, f"leaves out its call of {name!r}")

  def _unsure(self, i: int, why: str) -> InputError:
    return InputError(
      f"{self._where} cannot be marked: for message {i}, the assistant's, it {why}; put "
      "{% generation %} and {% endgeneration %} around what is trained on"
    )


def _bare(text: str, cut: re.Pattern[str]) -> str:
  """Returns a text without special tokens and white space."""
  return "".join(cut.sub("", text).split())


def _next(message: Message) -> JsonObject:
  """Returns a message that may follow an assistant's."""
  if not (calls := message.get("tool_calls")):
    return {"role": "user", "content": PROBE}
  function = _function(calls[0])
  return {
    "role": "tool",
    "name": function.get("name"),
    "tool_call_id": calls[0].get("id"),
    "content": PROBE,
  }


def _function(call: Any) -> Mapping[str, Any]:
  """Returns the part of a tool call that names its function: all of it, or its "function"."""
  function = call.get("function", call) if isinstance(call, Mapping) else None
  if not isinstance(function, Mapping):
    raise InputError(f"a tool call is {call!r:.80}; it is a dictionary with a function's name")
  return function


def _common(a: str, b: str, cut: re.Pattern[str]) -> str:
  """Returns what both begin with, in whole pieces between special tokens."""
  same = []
  for x, y in zip(cut.split(a), cut.split(b), strict=False):
    if x != y:
      break
    same.append(x)
  return "".join(same)
