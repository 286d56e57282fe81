"""Chats to text and tokens by a model's own Jinja template, and which tokens to train on.

The text is what transformers' `apply_chat_template` gives. A token is the assistant's if the model
has to emit it: those between the generation prompt that a template writes for a turn and the end of
that turn, the token that ends it included.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from distill_jax.data import sandboxed_jinja
from distill_jax.data.chat_turns import Draw, Message, TurnFinder, prompted
from distill_jax.data.tokenizers import Tokenizer, special_pattern
from distill_jax.errors import InputError
from distill_jax.hub.tokenizer import TokenizerFiles
from distill_jax.types import JsonObject

NAMED = tuple(f"{r}_token" for r in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# Classes that name no special tokens of their own where tokenizer_config.json names none.
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
# transformers' own arguments, which would reach the template alone, as names that it ignores.
TAKEN = ("add_generation_prompt", "continue_final_message", "chat_template")


@dataclasses.dataclass(frozen=True)
class Marked:
  """A rendered chat and what of it is the assistant's.

  Attributes:
    text: all of it.
    spans: (start, end) characters of `text`, in order, that the model has to emit.
    unmarked: indices of the assistant messages without a span, since the messages after
      them changed how they are written (templates that drop earlier reasoning do that, and
      no model emits such a turn). Each can be trained on as the last of a chat of its own.
  """

  text: str
  spans: tuple[tuple[int, int], ...]
  unmarked: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
  """A chat template with the tokens that it writes.

  Attributes:
    source: Jinja.
    tokens: (role, token), such as ("bos_token", "<s>"): what a template reads by that name.
    added: further tokens that the tokenizer's config adds to its vocabulary.
    tool_use: another source, for chats with tools; None where `source` serves for both.
    where: whose template it is, for messages.
  """

  source: str
  tokens: tuple[tuple[str, str], ...] = ()
  added: tuple[str, ...] = ()
  tool_use: str | None = None
  where: str = "the chat template"

  @classmethod
  def of(cls, files: TokenizerFiles, name: str) -> ChatTemplate:
    """Returns the chat template of the model called `name`.

    Raises:
      InputError: there is none, it is not Jinja, or it reads a token that nothing names.
    """
    if not isinstance(source := files.chat_template, str):
      raise InputError(f"{name} brings no chat template; give a model that was trained to chat")
    config, where = files.config, f"the chat template of {name}"
    tokens = {r: _spelt(config[r], r, name) for r in NAMED if config.get(r) is not None}
    try:
      named = config["chat_template"]
      several = {t["name"]: t["template"] for t in named} if isinstance(named, list) else {}
      decoder = config.get("added_tokens_decoder") or {}
      extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
      listed = [*decoder.values(), *(extra.values() if isinstance(extra, dict) else extra)]
    except (AttributeError, TypeError) as e:
      raise InputError(f"the tokenizer_config.json of {name} is damaged ({e}); mend it") from e
    added = dict.fromkeys(_spelt(t, "an added token", name) for t in listed)
    out = cls(source, tuple(tokens.items()), tuple(added), several.get("tool_use"), where)
    for text in filter(None, (out.source, out.tool_use)):
      read = sandboxed_jinja.compiled(text, where).reads
      # A class of its own may name it in transformers' code; an empty string would be a guess.
      if config.get("tokenizer_class") not in GENERIC and (lost := read & set(NAMED) - set(config)):
        raise InputError(
          f"{where} writes {min(lost)}, which tokenizer_config.json does not name; name it "
          "there, or say that it is null"
        )
    return out

  def render(
    self,
    messages: Sequence[Message],
    tools: Sequence[Message] | None = None,
    add_generation_prompt: bool = False,
    **extra: Any,
  ) -> str:
    """Returns a chat's text, as transformers' `apply_chat_template(tokenize=False)` does.

    Args:
      messages: {"role": ..., "content": ...} and what else the template reads, as JSON has
        it. Keys whose value is None are left out.
      tools: JSON schemas.
      add_generation_prompt: ends with what the assistant's next turn begins with.
      extra: what else the template reads, such as enable_thinking or date_string. Without
        the latter, some templates write today's date.

    Raises:
      InputError: the template refuses the messages, in its own words, or fails on them; or
        a prompt is asked for and it writes none.
    """
    draw = self._drawer(messages, tools, extra)
    return prompted(draw, messages, self.where) if add_generation_prompt else draw(messages)

  def mark(
    self,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Message] | None = None,
    **extra: Any,
  ) -> Marked:
    """Renders a chat and finds the assistant's parts.

    A template with `{% generation %}` blocks marks them itself. With any other, a turn is what
    its rendering adds to the messages before it with a generation prompt; it ends with its
    last special token if only white space follows that. Whatever cannot be told for sure
    this way is refused.

    Raises:
      InputError: as `render` does, and where a template cannot be marked.
    """
    draw = self._drawer(messages, tools, extra)
    text = draw(messages)
    template = sandboxed_jinja.compiled(self._source(tools), self.where)
    if template.generation:
      return Marked(text, template.blocks(text, draw(messages, blocks=True)), ())
    cut = special_pattern({*tokenizer.special_tokens, *dict(self.tokens).values()})
    turns = TurnFinder(draw, cut, self.where)
    spans, unmarked = [], []
    for i, message in enumerate(messages):
      if message["role"] == "assistant":
        turn = turns.find(messages, i, text)
        if text.startswith(turn.text[: turn.span[1]]):
          spans.append(turn.span)
        else:
          unmarked.append(i)
    return Marked(text, tuple(spans), tuple(unmarked))

  def tokens_and_mask(
    self,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Message] | None = None,
    **extra: Any,
  ) -> tuple[list[int], list[bool]]:
    """Returns a chat's ids, as `apply_chat_template(tokenize=True)` does, and the assistant's.

    Those are the tokens that lie wholly in the spans of `mark`: one that holds a character
    of the prompt too is not. Assistant messages that `mark` leaves unmarked are as unmarked
    here.

    Returns:
      ids, and for each whether it is the assistant's.

    Raises:
      InputError: as `mark` does; a special token in the text that the tokenizer lacks.
    """
    marked = self.mark(tokenizer, messages, tools, **extra)
    special = [*dict(self.tokens).values(), *self.added]
    ids, places = tokenizer.encode_places(marked.text, special)
    mask, spans = [], list(marked.spans)
    for start, end in places:
      while spans and spans[0][1] <= start:
        spans.pop(0)
      # No width at all: a byte of a character, or a mark put before the next one.
      mask.append(bool(spans) and spans[0][0] <= start and end <= spans[0][1])
    return ids, mask

  def _source(self, tools: Sequence[Message] | None) -> str:
    return self.source if tools is None or self.tool_use is None else self.tool_use

  def _drawer(self, messages: Sequence[Message], tools: Any, extra: JsonObject) -> Draw:
    """Renders parts of one chat, all at the same moment."""
    if not isinstance(messages, Sequence) or not messages:
      raise InputError(f"a chat is {messages!r}; give a list of at least one message")
    if tools is not None and not all(isinstance(t, Mapping) for t in tools):
      raise InputError("a tool is not a JSON schema; give each as a dictionary")
    if taken := [k for k in TAKEN if k in extra]:
      raise InputError(f"{taken[0]} is no variable for the chat template; leave it out here")
    now, source = datetime.datetime.now(), self._source(tools)
    names = {
      "strftime_now": lambda form: now.strftime(form),
      **dict(self.tokens),
      "documents": None,
      **sandboxed_jinja.plain(extra),
      "tools": sandboxed_jinja.plain(tools),
    }
    done: dict[Any, str] = {}  # a message's turn is rendered with and without what follows

    def draw(messages: Sequence[Message], prompt: bool = False, blocks: bool = False) -> str:
      chat = [sandboxed_jinja.message(m) for m in messages]
      key = (repr(chat), prompt, blocks)
      if key not in done:
        template = sandboxed_jinja.compiled(source, self.where)
        values = {**names, "messages": chat, "add_generation_prompt": prompt}
        done[key] = template.render(values, blocks)
      return done[key]

    return draw


def _spelt(token: Any, subject: str, name: str) -> str:
  """Returns the text of a token in tokenizer_config.json: a string, or an object that has it."""
  spelt = token.get("content") if isinstance(token, dict) else token
  if not isinstance(spelt, str):
    raise InputError(f"tokenizer_config.json of {name} has {subject} {token!r:.80}; it is a string")
  return spelt
