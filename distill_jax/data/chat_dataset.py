"""Chats to tokens: what the assistant says is learnt, and nothing else.

A line of JSON is a chat: {"messages": [{"role": ..., "content": ...}, ...], "tools": [...]},
or a sample as `generate` and `filter` write them, {"prompt": ..., "text": ...}, whose prompt is
text (a user's) or messages, and whose text the assistant's answer.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from distill_jax.data.chat_template import ChatTemplate
from distill_jax.data.sources import Source, documents
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError

ON_BAD = ("stop", "skip")


def tokens(
  source: Source,
  tokenizer: Tokenizer,
  template: ChatTemplate,
  longest: int,
  on_bad: str,
  trust: str = "",
) -> Iterator[tuple[list[int], list[bool], float]]:
  """(ids, which of them to learn, their label smoothing) of each chat of a source.

  A chat cannot be used that is no chat, that the template refuses, that is longer than
  `longest` tokens, that has nothing to learn, or nothing from 0 to 1 in the field `trust`: with
  on_bad "stop" it is refused, with "skip" it is left out, and the standard error says how many
  were and why.

  Raises:
    InputError: as said; or no chat at all can be used.
  """
  if on_bad not in ON_BAD:
    raise InputError(f"data.on_bad is {on_bad!r}; it can be one of {ON_BAD}")
  left_out: Counter[str] = Counter()
  used = unmarked = 0
  for number, line in enumerate(documents(source), 1):
    where = f"{source.path}, chat {number} of split {source.split!r}"
    try:
      messages, tools = parse(line, where)
      smoothing = 1 - trusted(line, trust) if trust else 0.0
      ids, mask = template.tokens_and_mask(tokenizer, messages, tools)
      unmarked += len(template.mark(tokenizer, messages, tools).unmarked)
      why = _useless(ids, mask, longest)
    except InputError as error:
      if on_bad == "stop":
        raise InputError(f"{where}: {error}") from error
      left_out[str(error).removeprefix(f"{where}: ")[:80]] += 1
      continue
    if why and on_bad == "stop":
      raise InputError(f"{where} {why}; leave it out, or set data.on_bad='skip'")
    if why:
      left_out[why] += 1
      continue
    used += 1
    yield ids, mask, smoothing
  for why, n in left_out.most_common():
    print(f"{source.path}: {n} of {used + left_out.total()} chats left out: {why}", file=sys.stderr)
  if unmarked:
    print(
      f"{source.path}: {unmarked} turns are not learnt, since what follows them changes how the "
      "template writes them; give each chat up to such a turn as a chat of its own",
      file=sys.stderr,
    )
  if not used:
    raise InputError(f"{source.path}: none of its chats can be used; the lines above say why")


def parse(line: str, where: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
  """(messages, tools) of a line."""
  try:
    record = json.loads(line)
  except (ValueError, RecursionError) as e:
    raise InputError(f"{where}: not JSON ({e}); mend the line") from e
  if not isinstance(record, dict):
    raise InputError(f"{where}: a JSON {type(record).__name__}; each line is one object")
  messages = record.get("messages")
  if messages is None and "prompt" in record and isinstance(record.get("text"), str):
    asked = record["prompt"]
    asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    answer = {"role": "assistant", "content": record["text"]}
    messages = [*asked, answer] if isinstance(asked, list) else None
  if not isinstance(messages, list) or not all(
    isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
  ):
    raise InputError(f"{where}: neither a list of 'messages' nor 'prompt' and 'text'; give one")
  return messages, record.get("tools")


def trusted(line: str, field: str) -> float:
  """What a field says of how far a line's labels are to be trusted."""
  value = json.loads(line).get(field)
  if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
    raise InputError(
      f"its field {field!r} is {value!r:.60}, and data.trust names one from 0 to 1, such as "
      "votes leave"
    )
  return float(value)


def _useless(ids: list[int], mask: list[bool], longest: int) -> str:
  if len(ids) > longest:
    return f"is longer than the {longest} tokens of data.seq_len"
  return "" if any(mask) else "has nothing that the assistant says"
