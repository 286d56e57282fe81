"""The texts that a chat template writes around the contents of messages.

The texts are found by rendering chats whose contents are known strings. So they hold for chats of
a system message and alternating turns of user and assistant; calls of tools are not covered.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import re
from collections.abc import Sequence

from distill_jax.data.chat_template import ChatTemplate
from distill_jax.data.tokenizers import SPACE, Tokenizer, special_pattern
from distill_jax.errors import InputError

ROLES = ("system", "user", "assistant")
AFTER = {"system": "user", "user": "assistant", "assistant": "user"}  # the next role
# Templates that write the date get this one, so that results do not depend on the day.
DATE = datetime.datetime(2025, 1, 1)
_OTHER_DATE = datetime.datetime(2031, 12, 28, 23, 59, 58)


@dataclasses.dataclass(frozen=True)
class Markers:
  """The texts that a template writes around contents.

  Attributes:
    begin: By role of the first message, the text before its content.
    begin_pattern: The same as regular expressions that match any date.
    between: By role, the text from the end of a content to the beginning of the next one. The text
      after an assistant's content begins with `before_end` and `end`.
    last: By role, the text after the content of the last message.
    before_end: The text between an assistant's content and `end`, mostly "".
    end: The token that ends an assistant's turn.
    end_id: Its id.
    ids: The ids of the added tokens in the texts above, except for white space.
  """

  begin: dict[str, str]
  begin_pattern: dict[str, str]
  between: dict[str, str]
  last: dict[str, str]
  before_end: str
  end: str
  end_id: int
  ids: frozenset[int]


def dated(template: ChatTemplate) -> ChatTemplate:
  """Returns a template that writes a fixed date."""
  return template if template.now else dataclasses.replace(template, now=DATE)


def find_markers(template: ChatTemplate, tokenizer: Tokenizer) -> Markers:
  """Returns the texts that a template writes around contents.

  Raises:
    InputError: If the template does not write contents, writes turns differently depending on
      their number, or does not end turns with a token.
  """
  where = template.where
  turns = ["user", "assistant"] * 3
  begin, ua, au, ua_2, au_2, ua_last, end = _split(dated(template), turns)
  if (ua, au) != (ua_2, au_2) or not ua_last.startswith(ua):
    raise InputError(
      f"{where} writes turns differently depending on their number. Records in its form cannot be "
      "aligned: record text without a chat template."
    )
  found = special_pattern({*tokenizer.special_tokens, *dict(template.tokens).values()}).search(au)
  end_id = tokenizer.token_id(found[0]) if found else None
  if found is None or end_id is None:
    raise InputError(
      f"{where} does not end an assistant's turn with a special token. Records in its form cannot "
      "be aligned: use a template that does."
    )
  begins, between = {"user": begin}, {"user": ua, "assistant": au}
  with contextlib.suppress(InputError):  # some templates have no system messages
    begins["system"], between["system"], *_ = _split(dated(template), ["system", *turns[:3]])
  return Markers(
    begin=begins,
    begin_pattern={role: _pattern(template, role, text) for role, text in begins.items()},
    between=between,
    last={"user": _split(dated(template), turns[:3])[-1], "assistant": end},
    before_end=au[: found.start()],
    end=found[0],
    end_id=end_id,
    ids=_added(tokenizer, "".join([*begins.values(), *between.values()])),
  )


def _added(tokenizer: Tokenizer, text: str) -> frozenset[int]:
  """Returns the ids of the added tokens in a text, except for white space."""
  names = set(tokenizer.special_tokens)
  if tokenizer.kind == "huggingface":
    names |= {token["content"] for token in json.loads(tokenizer.raw).get("added_tokens", ())}
  found = special_pattern(name for name in names if name.strip(SPACE + " \t\r\n"))
  ids = {tokenizer.token_id(name) for name in found.findall(text)}
  return frozenset(i for i in ids if i is not None)


def _split(template: ChatTemplate, roles: Sequence[str]) -> list[str]:
  """Returns the texts before, between and after the contents of messages of these roles."""
  contents = [f"Probe{chr(65 + i)}{role}" for i, role in enumerate(roles)]
  chat = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
  text, out = template.render(chat), []
  for content in contents:
    before, found, text = text.partition(content)
    if not found or content in text:
      raise InputError(
        f"{template.where} does not write each message once, in order. Records in its form cannot "
        "be aligned: use another template."
      )
    out.append(before)
  return [*out, text]


def _pattern(template: ChatTemplate, role: str, text: str) -> str:
  """Returns a regular expression for the beginning of a chat with any date."""
  other = dataclasses.replace(dated(template), now=_OTHER_DATE)
  roles = [role, AFTER[role]] if role == "user" else [role, "user", "assistant"]
  a, b = re.split(r"(\w+)", text), re.split(r"(\w+)", _split(other, roles)[0])
  if len(a) != len(b):
    return re.escape(text)
  return "".join(re.escape(x) if x == y else r"\w+" for x, y in zip(a, b, strict=True))
