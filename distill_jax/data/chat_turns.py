"""Finding the assistant's turns in a rendered chat if the template does not mark them.

A turn is the text that its message adds to the chat before it and the generation prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from distill_jax.data import sandboxed_jinja
from distill_jax.errors import InputError

if TYPE_CHECKING:  # the workers of `pack` must not import jax
  from distill_jax.types import JsonObject

PROBE = "probe"  # content of a test message, to see the text that a template writes around it

Message = Mapping[str, Any]
Draw = Callable[..., str]  # (messages, prompt=False) -> text


class Turn(NamedTuple):
  """A chat up to and including an assistant's message.

  Attributes:
    text: The rendered chat up to that message, without later messages.
    span: The (start, end) character offsets in `text` of the part that the model generates.
  """

  text: str
  span: tuple[int, int]


def prompted(draw: Draw, messages: Sequence[Message], where: str) -> str:
  """Returns the text of messages with the generation prompt for the assistant's next turn.

  Some templates need no generation prompt, because a turn directly follows the messages. Others
  ignore `add_generation_prompt` and write a header together with the turn; those are refused.

  Raises:
    InputError: If the template needs a generation prompt and does not write one.
  """
  text = draw(messages, prompt=True)
  if text != draw(messages):
    return text
  turn = draw([*messages, {"role": "assistant", "content": PROBE}])
  if not turn.startswith(text) or not turn[len(text) :].lstrip().startswith(PROBE):
    raise InputError(
      f"{where} writes no generation prompt before an assistant's turn. Use "
      "`add_generation_prompt` in the template."
    )
  return text


class TurnFinder:
  """Finds the assistant's turns of one chat.

  Args:
    draw: Renders messages of the chat.
    cut: A pattern that splits a text at special tokens.
    where: The name of the template, for messages.
  """

  def __init__(self, draw: Draw, cut: re.Pattern[str], where: str):
    self._draw, self._cut, self._where = draw, cut, where

  def find(self, messages: Sequence[Message], i: int, text: str) -> Turn:
    """Finds the part of assistant message i that the model generates.

    The part starts at the end of the generation prompt. To find its end, the chat up to the message
    is rendered twice: without a generation prompt (`alone`) and with one (`with_prompt`). There are
    three kinds of templates:

      condition                        template                            the turn ends with
      with_prompt = alone + prompt     writes a prompt after each turn     alone
      with_prompt = alone              writes no prompt after a turn       alone, if it is also a
                                                                           prefix of a longer chat
      neither                          writes a special end of the chat    the common prefix

    In each case, the end moves back to the last special token, if only white space follows it.

    Args:
      messages: The whole chat.
      i: The index of the assistant's message.
      text: The whole chat, rendered.

    Raises:
      InputError: If the turn cannot be found with certainty.
    """
    before = prompted(self._draw, messages[:i], self._where)
    alone, with_prompt = self._draw(messages[: i + 1]), self._draw(messages[: i + 1], prompt=True)
    if not alone.startswith(before):
      raise self._unsure(i, "does not start the turn with its generation prompt")
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
    """Checks that the next message does not change a turn, for templates without a prompt after it.

    Such a template writes after a turn either nothing or always the next turn's header, which the
    next message then follows.
    """
    followed = text.startswith(alone) and text != alone
    longer = text if followed else self._draw([*messages[: i + 1], _next(messages[i])])
    if not longer.startswith(alone):
      raise self._unsure(i, "changes the end of the turn if a message follows")

  def _without_chat_end(
    self, messages: Sequence[Message], i: int, alone: str, with_prompt: str
  ) -> str:
    """Returns `alone` without the special text that the template writes at the end of a chat.

    The result is certain only if the rest of `with_prompt` is exactly the generation prompt, as it
    was written before message i, and the turn has a special token.
    """
    before = prompted(self._draw, messages[:i], self._where)
    stable = _common(alone, with_prompt, self._cut)
    prompt = before[len(_common(before, self._draw(messages[:i]), self._cut)) :]
    if with_prompt != stable + prompt or not self._cut.search(stable, len(before)):
      raise self._unsure(i, "changes the end of the turn if a generation prompt follows")
    return stable

  def _check_whole(self, message: Message, i: int, before: str, turn: str) -> None:
    """Checks that a turn contains its whole message, except for white space and special tokens.

    The beginning of the message may be in the prompt, e.g. an empty block of reasoning.
    """
    before, written = _bare(before, self._cut), _bare(turn, self._cut)
    for key in ("content", *sandboxed_jinja.REASONING):
      part = message.get(key)
      if isinstance(part, list):
        part = "".join(p["text"] for p in part if isinstance(p, dict) and p.get("type") == "text")
      part = _bare(part, self._cut) if isinstance(part, str) else ""
      if part not in before[len(before) - max(len(part) - 1, 0) :] + written:
        raise self._unsure(i, f"omits or changes a part of its {key}")
    for call in message.get("tool_calls") or []:
      name = str(_function(call).get("name"))
      if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", turn):
        raise self._unsure(i, f"omits its call of {name!r}")

  def _unsure(self, i: int, why: str) -> InputError:
    return InputError(
      f"{self._where} does not show which tokens to train on: for the assistant's message {i}, it "
      f"{why}. Put {{% generation %}} and {{% endgeneration %}} around the text to train on."
    )


def _bare(text: str, cut: re.Pattern[str]) -> str:
  """Returns a text without special tokens and white space."""
  return "".join(cut.sub("", text).split())


def _next(message: Message) -> JsonObject:
  """Returns a message that may follow an assistant's message."""
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
  """Returns the part of a tool call that names the function: its "function", or the whole call."""
  function = call.get("function", call) if isinstance(call, Mapping) else None
  if not isinstance(function, Mapping):
    raise InputError(f"A tool call is {call!r:.80}; expected a dict with a function's name.")
  return function


def _common(a: str, b: str, cut: re.Pattern[str]) -> str:
  """Returns the common prefix of two texts, in whole pieces between special tokens."""
  same = []
  for x, y in zip(cut.split(a), cut.split(b), strict=False):
    if x != y:
      break
    same.append(x)
  return "".join(same)
