"""Chats to tokens; only the assistant's turns are trained on.

A line of JSON is a chat: {"messages": [{"role": ..., "content": ...}, ...], "tools": [...]},
or a sample as `generate` and `filter` write them, {"prompt": ..., "text": ...}, whose prompt is
text (the user's) or messages, and whose text is the assistant's turn.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from distill_jax.data import jsonl
from distill_jax.data.bad_input import BadInputPolicy
from distill_jax.data.chat_template import ChatTemplate
from distill_jax.data.packing import MaskedDocument
from distill_jax.data.sources import DocumentSource, documents
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.types import JsonObject


def tokenized_chats(
  source: DocumentSource,
  tokenizer: Tokenizer,
  template: ChatTemplate,
  max_tokens: int,
  on_bad: str,
  trust: str = "",
) -> Iterator[MaskedDocument]:
  """Yields the tokens of each chat of a source, with those to train on and their label smoothing.

  A chat is unusable if its line is not a chat, the template refuses it, it is longer than
  `max_tokens`, it has no assistant turn to train on, or its field `trust` is not from 0 to 1.
  At the end, standard error says how many were left out and why.

  Args:
    source: of kind "chat".
    tokenizer: the tokenizer that belongs to the template.
    template: renders the chats.
    max_tokens: the length of the longest chat that is used.
    on_bad: "stop" at an unusable chat, or "skip" it.
    trust: the field with the confidence in a chat's labels; label smoothing is 1 - confidence.
      "": no smoothing.

  Raises:
    InputError: a chat is unusable and on_bad is "stop", or all are.
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
      bad.reject_subject(where, "has nothing that the assistant says")
    else:
      used += 1
      yield MaskedDocument(ids, mask, smoothing)
  bad.report(source.path, used, "chats")
  if unmarked:
    print(
      f"{source.path}: {unmarked} turns are not trained on, since later messages change how the "
      "template writes them; give each chat up to such a turn as a chat of its own",
      file=sys.stderr,
    )
  if not used:
    raise InputError(f"{source.path}: none of its chats can be used; the lines above say why")


def parse(line: str) -> tuple[list[JsonObject], list[JsonObject] | None]:
  """Returns (messages, tools) of a line.

  Raises:
    InputError: the line is not JSON, or neither a chat nor a sample.
  """
  record = jsonl.parse_object(line)
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
    raise InputError("neither a list of 'messages' nor 'prompt' and 'text'; give one")
  return messages, record.get("tools")


def confidence(line: str, field: str) -> float:
  """Returns how far a line's labels are to be trusted, from 0 to 1, as its field says."""
  value = jsonl.parse_object(line).get(field)
  if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
    raise InputError(
      f"its field {field!r} is {value!r:.60}, and data.trust names a number from 0 to 1, such as "
      "the votes filter writes"
    )
  return float(value)
