"""Chats as token sequences in which only the assistant's turns are trained on.

Each line of a file is a JSON object. It is either a chat, {"messages": [{"role": ..., "content":
...}, ...], "tools": [...]}, or a sample written by `generate` or `filter`, {"prompt": ..., "text":
...}. The prompt of a sample is a user's message or a list of messages; its text is the assistant's
turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from distill_jax.data.bad_input import BadInputPolicy
from distill_jax.data.chat_template import ChatTemplate
from distill_jax.data.sources import Document
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.runtime import json_io

if TYPE_CHECKING:  # the workers of `pack` must not import jax
  from distill_jax.types import JsonObject


@dataclasses.dataclass(frozen=True)
class ChatTokenizer:
  """Turns chats into tokens with a mask and label smoothing. It can be pickled.

  Attributes:
    tokenizer: The tokenizer that belongs to the template.
    template: The chat template.
    max_tokens: The maximum length of a chat.
    trust: The field with the confidence in a chat's labels; label smoothing is 1 - confidence.
      "": no smoothing.
  """

  tokenizer: Tokenizer
  template: ChatTemplate
  max_tokens: int
  trust: str = ""

  def chats(self, documents: Iterable[Document], bad: BadInputPolicy) -> Iterator[TokenizedChat]:
    """Yields each chat that can be used.

    A chat cannot be used if its line is not a chat, the template rejects it, it is longer than
    `max_tokens`, it has no assistant turn to train on, or its field `trust` is not in [0, 1].

    Args:
      documents: The lines.
      bad: The policy for chats that cannot be used.

    Raises:
      InputError: If a chat cannot be used and the policy is to stop.
    """
    for line, where, _ in documents:
      try:
        chat = self._chat(line)
      except InputError as error:
        bad.reject(where, str(error))
        continue
      if len(chat.ids) > self.max_tokens:
        bad.reject_subject(where, f"is longer than the {self.max_tokens} tokens of data.seq_len")
      elif not any(chat.mask):
        bad.reject_subject(where, "has no assistant turn to train on")
      else:
        yield chat

  def _chat(self, line: str) -> TokenizedChat:
    messages, tools = parse(line)
    smoothing = 1 - confidence(line, self.trust) if self.trust else 0.0
    marked = self.template.mark(self.tokenizer, messages, tools)
    ids, mask = self.template.tokens_of(self.tokenizer, marked)
    return TokenizedChat(ids, mask, smoothing, len(marked.unmarked))


class TokenizedChat(NamedTuple):
  """A chat as tokens.

  Attributes:
    ids: The token ids.
    mask: True for tokens that are trained on.
    smoothing: The label smoothing.
    unmarked: The number of assistant turns that are not trained on; see chat_template.Marked.
  """

  ids: list[int]
  mask: list[bool]
  smoothing: float
  unmarked: int


def parse(line: str) -> tuple[list[JsonObject], list[JsonObject] | None]:
  """Returns the messages of a line, and its tools or None.

  Raises:
    InputError: If the line is neither a chat nor a sample.
  """
  record = json_io.parse_object(line, "The line")
  messages = record.get("messages")
  if messages is None and "prompt" in record and isinstance(record.get("text"), str):
    prompt = record["prompt"]
    if isinstance(prompt, str):
      prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list):
      messages = [*prompt, {"role": "assistant", "content": record["text"]}]
  if not isinstance(messages, list) or not all(
    isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
  ):
    raise InputError("The line has neither a list of 'messages' nor a 'prompt' and a 'text'.")
  return messages, record.get("tools")


def confidence(line: str, field: str) -> float:
  """Returns the confidence in a line's labels, a number in [0, 1].

  Args:
    line: A line of JSON.
    field: The field with the confidence (data.trust).

  Raises:
    InputError: If the field is not a number in [0, 1].
  """
  value = json_io.parse_object(line, "The line").get(field)
  if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
    raise InputError(
      f"Field {field!r} is {value!r:.60}; expected a number from 0 to 1, since data.trust names it."
    )
  return float(value)
