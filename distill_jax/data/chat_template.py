"""Chats rendered as text and tokens by a model's Jinja chat template, and the tokens to train on.

The text equals that of transformers' `apply_chat_template`. The tokens to train on are those that
the model has to generate: in each assistant turn, the tokens after the generation prompt, up to and
including the token that ends the turn.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distill_jax.data import sandboxed_jinja
from distill_jax.data.chat_turns import Draw, Message, TurnFinder, prompted
from distill_jax.data.tokenizers import Tokenizer, special_pattern
from distill_jax.errors import InputError, bad_value

if TYPE_CHECKING:  # the workers of `pack` must not import jax
  from distill_jax.hub.tokenizer import TokenizerFiles
  from distill_jax.types import JsonObject

NAMED = tuple(f"{r}_token" for r in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# Tokenizer classes without default special tokens in transformers' code.
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
# Arguments of apply_chat_template that are not variables of the template.
RESERVED = ("add_generation_prompt", "continue_final_message", "chat_template")


@dataclasses.dataclass(frozen=True)
class Marked:
  """A rendered chat and the parts of it that the model has to generate.

  Attributes:
    text: The rendered chat.
    spans: The (start, end) character offsets in `text` of the parts to generate, in order.
    unmarked: The indices of the assistant messages without a span, because later messages change
      how they are rendered (e.g. templates that drop earlier reasoning). A model never generates
      them in that form. They can be trained on at the end of a shorter chat.
  """

  text: str
  spans: tuple[tuple[int, int], ...]
  unmarked: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
  """A chat template and the special tokens that it uses.

  Attributes:
    source: The Jinja source.
    tokens: Pairs of a variable name and the token that it stands for, e.g. ("bos_token", "<s>").
    added: Further tokens that the tokenizer's config adds to the vocabulary.
    tool_use: The Jinja source for chats with tools; None if it is `source`.
    where: The name of the template, for messages.
    now: The date and time that the template may write; None for the current one.
  """

  source: str
  tokens: tuple[tuple[str, str], ...] = ()
  added: tuple[str, ...] = ()
  tool_use: str | None = None
  where: str = "The chat template"
  now: datetime.datetime | None = None

  @classmethod
  def of(cls, files: TokenizerFiles, name: str) -> ChatTemplate:
    """Returns the chat template of a model.

    Args:
      files: The model's tokenizer files.
      name: The model's name, for messages.

    Raises:
      InputError: If there is no template, it is not valid Jinja, or it uses a special token that
        the tokenizer's config does not define.
    """
    if not isinstance(source := files.chat_template, str):
      raise InputError(f"{name} has no chat template. Use a chat model or its tokenizer.")
    config, where = files.config, f"The chat template of {name}"
    tokens = {r: _token_text(config[r], r, name) for r in NAMED if config.get(r) is not None}
    try:
      named = config["chat_template"]
      several = {t["name"]: t["template"] for t in named} if isinstance(named, list) else {}
      decoder = config.get("added_tokens_decoder") or {}
      extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
      listed = [*decoder.values(), *(extra.values() if isinstance(extra, dict) else extra)]
    except (AttributeError, TypeError) as e:
      raise InputError(f"tokenizer_config.json of {name} is damaged ({e}). Correct it.") from e
    added = dict.fromkeys(_token_text(t, "an added token", name) for t in listed)
    out = cls(source, tuple(tokens.items()), tuple(added), several.get("tool_use"), where)
    for text in filter(None, (out.source, out.tool_use)):
      read = sandboxed_jinja.compiled(text, where).reads
      # A model-specific class may define the token in transformers' code, which is not read here.
      if config.get("tokenizer_class") not in GENERIC and (lost := read & set(NAMED) - set(config)):
        raise InputError(
          f"{where} uses {min(lost)}, which tokenizer_config.json does not define. Define it there "
          "(as null if the model has no such token)."
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
      messages: Dicts with "role", "content" and other keys that the template reads, with JSON
        values. Keys with the value None are ignored.
      tools: JSON schemas of the tools.
      add_generation_prompt: True to append the generation prompt for the assistant's next turn.
      extra: Other variables of the template, e.g. enable_thinking or date_string. Without
        date_string, some templates write the current date.

    Raises:
      InputError: If the template rejects the messages or fails on them, or if it has no generation
        prompt and one is requested.
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
    """Renders a chat and finds the parts that the model has to generate.

    In a template with `{% generation %}` blocks, these are the blocks. In another template, a turn
    is the text that its message adds to the chat before it and the generation prompt; the turn ends
    with its last special token, if only white space follows that token. Templates for which this
    rule is ambiguous are refused.

    Args:
      tokenizer: The tokenizer that belongs to the template.
      messages: See `render`.
      tools: See `render`.
      extra: See `render`.

    Raises:
      InputError: See `render`; or if the turns of the template cannot be found.
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
    """Returns the token ids and the mask of `tokens_of`, for a chat that is not rendered yet.

    Raises:
      InputError: See `mark` and `tokens_of`.
    """
    return self.tokens_of(tokenizer, self.mark(tokenizer, messages, tools, **extra))

  def tokens_of(self, tokenizer: Tokenizer, marked: Marked) -> tuple[list[int], list[bool]]:
    """Returns a chat's token ids and the mask of the tokens that the model has to generate.

    The ids equal those of transformers' `apply_chat_template(tokenize=True)`. The mask is True for
    tokens that are entirely inside the spans of `mark`; a token that also contains a character of
    the prompt is not.

    Args:
      tokenizer: The tokenizer that belongs to the template.
      marked: The rendered chat, from `mark`.

    Returns:
      (ids, mask), two lists of the same length.

    Raises:
      InputError: If the tokenizer lacks a special token of the text.
    """
    special = [*dict(self.tokens).values(), *self.added]
    ids, places = tokenizer.encode_places(marked.text, special)
    mask, spans = [], list(marked.spans)
    for start, end in places:
      while spans and spans[0][1] <= start:
        spans.pop(0)
      # A token without width is a byte of a character, or a mark before the next token.
      mask.append(bool(spans) and spans[0][0] <= start and end <= spans[0][1])
    return ids, mask

  def _source(self, tools: Sequence[Message] | None) -> str:
    return self.source if tools is None or self.tool_use is None else self.tool_use

  def _drawer(self, messages: Sequence[Message], tools: Any, extra: JsonObject) -> Draw:
    """Returns a function that renders parts of one chat, all with the same date and time."""
    if not isinstance(messages, Sequence) or not messages:
      raise bad_value("messages", messages, "a list of at least one message", "Correct it")
    if tools is not None and not all(isinstance(t, Mapping) for t in tools):
      raise InputError("A tool is not a JSON schema. Give each tool as a dict.")
    if reserved := [k for k in RESERVED if k in extra]:
      raise InputError(f"{reserved[0]} is not a variable of the chat template. Remove it.")
    now, source = self.now or datetime.datetime.now(), self._source(tools)
    names = {
      "strftime_now": lambda form: now.strftime(form),
      **dict(self.tokens),
      "documents": None,
      **sandboxed_jinja.plain(extra),
      "tools": sandboxed_jinja.plain(tools),
    }
    done: dict[Any, str] = {}  # a cache, since most parts are rendered more than once

    def draw(messages: Sequence[Message], prompt: bool = False, blocks: bool = False) -> str:
      chat = [sandboxed_jinja.message(m) for m in messages]
      key = (repr(chat), prompt, blocks)
      if key not in done:
        template = sandboxed_jinja.compiled(source, self.where)
        values = {**names, "messages": chat, "add_generation_prompt": prompt}
        done[key] = template.render(values, blocks)
      return done[key]

    return draw


def _token_text(token: Any, subject: str, name: str) -> str:
  """Returns the text of a token in tokenizer_config.json: a string, or an object's "content"."""
  text = token.get("content") if isinstance(token, dict) else token
  if not isinstance(text, str):
    raise InputError(
      f"tokenizer_config.json of {name} has {subject} {token!r:.80}; expected a string. Correct it."
    )
  return text
