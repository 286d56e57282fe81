"""Chats as token sequences in which only the assistant's turns are trained on.

Each line of a file is a JSON object. It is either a chat, {"messages": [{"role": ..., "content":
...}, ...], "tools": [...]}, or a sample written by `generate` or `filter`, {"prompt": ..., "text":
...}. The prompt of a sample is a user's message or a list of messages; its text is the assistant's
turn.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from distill_jax.data.bad_input import BadInputPolicy
from distill_jax.data.chat_template import ChatTemplate
from distill_jax.data.packing import MaskedDocument
from distill_jax.data.sources import DocumentSource, documents
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.runtime import json_io
from distill_jax.types import JsonObject


def tokenized_chats(
  source: DocumentSource,
  tokenizer: Tokenizer,
  template: ChatTemplate,
  max_tokens: int,
  on_bad: str,
  trust: str = "",
) -> Iterator[MaskedDocument]:
  """Yields each chat of a source as tokens, with the mask to train on and the label smoothing.

  A chat cannot be used if its line is not a chat, the template rejects it, it is longer than
  `max_tokens`, it has no assistant turn to train on, or its field `trust` is not in [0, 1]. The
  number of skipped chats is printed on standard error at the end.

  Args:
    source: A source of kind "chat".
    tokenizer: The tokenizer that belongs to the template.
    template: The chat template.
    max_tokens: The maximum length of a chat.
    on_bad: "stop" at a chat that cannot be used, or "skip" it.
    trust: The field with the confidence in a chat's labels; label smoothing is 1 - confidence.
      "": no smoothing.

  Raises:
    InputError: If a chat cannot be used and on_bad is "stop", or if no chat can be used.
  """
  bad = BadInputPolicy("data.on_bad", on_bad)
  used = unmarked = 0
  for number, line in enumerate(documents(source), 1):
    where = f"{source.path}, chat {number} of split {source.split!r}"
    try:
      messages, tools = parse(line)
      smoothing = 1 - confidence(line, trust) if trust else 0.0
      ids, mask = template.tokens_and_mask(tokenizer, messages, tools)
      unmarked += len(template.mark(tokenizer, messages, tools).unmarked)
    except InputError as error:
      bad.reject(where, str(error))
      continue
    if len(ids) > max_tokens:
      bad.reject_subject(where, f"is longer than the {max_tokens} tokens of data.seq_len")
    elif not any(mask):
      bad.reject_subject(where, "has no assistant turn to train on")
    else:
      used += 1
      yield MaskedDocument(ids, mask, smoothing)
  bad.report(source.path, used, "chats")
  if unmarked:
    print(
      f"{source.path}: {unmarked} assistant turns are not trained on, since the template renders "
      "them differently when messages follow. To train on such a turn, add a chat that ends with "
      "it.",
      file=sys.stderr,
    )
  if not used:
    raise InputError(
      f"{source.path} has no chat that can be used. The lines above give the reasons."
    )


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
