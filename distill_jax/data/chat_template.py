"""Chats to text and tokens by a model's own Jinja template, and which of them it is to learn.

The text is what transformers' `apply_chat_template` gives. A token is the assistant's where
the model has to emit it: what stands between the prompt that a template writes for a turn
and the end of that turn, the token that ends it included.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distill_jax.data import sandboxed_jinja
from distill_jax.data.tokenizers import Tokenizer, special_pattern
from distill_jax.errors import InputError
from distill_jax.hub.tokenizer import TokenizerFiles

NAMED = tuple(f"{r}_token" for r in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# Classes that name no special tokens of their own where tokenizer_config.json names none.
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
# transformers' own arguments, which would reach the template alone, as names that it ignores.
TAKEN = ("add_generation_prompt", "continue_final_message", "chat_template")
PROBE = "probe"  # a message's content, to see what a template writes around it

Message = Mapping[str, Any]
Draw = Callable[..., str]  # (messages, prompt=False) -> text


@dataclasses.dataclass(frozen=True)
class Marked:
  """A rendered chat and what of it is the assistant's.

  Attributes:
    text: all of it.
    spans: (start, end) characters of `text`, in order, that the model has to emit.
    unmarked: indices of the assistant messages without a span, since the messages after
      them changed how they are written (templates that drop earlier reasoning do that, and
      no model emits such a turn). Each can be learnt from the messages up to and with it.
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
    """The template that came with a model called `name`.

    Raises:
      InputError: there is none, it is no Jinja, or it reads a token that nothing names.
    """
    if not isinstance(source := files.chat_template, str):
      raise InputError(f"{name} brings no chat template; give a model that was taught to chat")
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
    """The text of a chat, as transformers' `apply_chat_template(tokenize=False)` gives it.

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
    return self._prompt(draw, messages) if add_generation_prompt else draw(messages)

  def mark(
    self,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Message] | None = None,
    **extra: Any,
  ) -> Marked:
    """Renders a chat and finds what the assistant says in it.

    A template with `{% generation %}` blocks says so itself. With any other, a turn is what
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
    spans, unmarked = [], []
    for i, message in enumerate(messages):
      if message["role"] == "assistant":
        through, span = self._turn(draw, messages, i, cut, text)
        if text.startswith(through[: span[1]]):
          spans.append(span)
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
    """A chat's ids, as `apply_chat_template(tokenize=True)` gives them, and which to learn.

    Marked are the tokens that lie wholly in the spans of `mark`: one that holds a character
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

  def _drawer(self, messages: Sequence[Message], tools: Any, extra: dict[str, Any]) -> Draw:
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

  def _prompt(self, draw: Draw, messages: Sequence[Message]) -> str:
    """The text of `messages` with the prompt for the assistant's next turn.

    Some templates need none: a turn follows the messages at once. Others ignore that one
    is wanted, and write a header with the turn.
    """
    text = draw(messages, prompt=True)
    if text != draw(messages):
      return text
    turn = draw([*messages, {"role": "assistant", "content": PROBE}])
    if not turn.startswith(text) or not turn[len(text) :].lstrip().startswith(PROBE):
      raise InputError(
        f"{self.where} writes no generation prompt, so nothing tells a model that its turn "
        "begins; use `add_generation_prompt` in it"
      )
    return text

  def _turn(
    self, draw: Draw, messages: Sequence[Message], i: int, cut: re.Pattern[str], text: str
  ) -> tuple[str, tuple[int, int]]:
    """Message i written as the last, and where in that the assistant's part is."""
    before = self._prompt(draw, messages[:i])
    through, asked = draw(messages[: i + 1]), draw(messages[: i + 1], prompt=True)
    if not through.startswith(before):
      raise self._unsure(i, "does not begin that turn as it begins its generation prompt")
    if asked == through:
      # Nothing comes after a turn, or the next one's header always does: what follows tells.
      longer = text.startswith(through) and text != through
      follows = text if longer else draw([*messages[: i + 1], _next(messages[i])])
      if not follows.startswith(through):
        raise self._unsure(i, "ends that turn otherwise when a message follows")
    stable = through
    if not asked.startswith(through):
      # The chat's end is written otherwise than a turn's. Then the prompt stands after the turn.
      stable = _common(through, asked, cut)
      prompt = before[len(_common(before, draw(messages[:i]), cut)) :]
      if asked != stable + prompt or not cut.search(stable, len(before)):
        raise self._unsure(i, "ends that turn otherwise when a prompt follows")
    ends = [m.end() for m in cut.finditer(stable, len(before))]
    end = ends[-1] if ends and not stable[ends[-1] :].strip() else len(stable)
    self._check_whole(messages[i], i, cut, before, through[len(before) : end])
    return through, (len(before), end)

  def _check_whole(
    self, message: Message, i: int, cut: re.Pattern[str], before: str, turn: str
  ) -> None:
    """Refuses a turn without all that the assistant says; spaces and special tokens aside.

    It may begin within the prompt, such as an empty thought.
    """
    bare = lambda s: "".join(cut.sub("", s).split())
    before, written = bare(before), bare(turn)
    for key in ("content", *sandboxed_jinja.REASONING):
      said = message.get(key)
      if isinstance(said, list):
        said = "".join(p["text"] for p in said if isinstance(p, dict) and p.get("type") == "text")
      said = bare(said) if isinstance(said, str) else ""
      if said not in before[len(before) - max(len(said) - 1, 0) :] + written:
        raise self._unsure(i, f"leaves out or changes some of its {key}")
    for call in message.get("tool_calls") or []:
      name = str(_function(call).get("name"))
      if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", turn):
        raise self._unsure(i, f"leaves out its call of {name!r}")

  def _unsure(self, i: int, why: str) -> InputError:
    return InputError(
      f"{self.where} cannot be marked: for message {i}, the assistant's, it {why}; put "
      "{% generation %} and {% endgeneration %} around what is learnt"
    )


def _next(message: Message) -> dict[str, Any]:
  """A message that may follow an assistant's."""
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
  """What a tool call says of its function: flat, or within it."""
  function = call.get("function", call) if isinstance(call, Mapping) else None
  if not isinstance(function, Mapping):
    raise InputError(f"a tool call is {call!r:.80}; it is a dictionary with a function's name")
  return function


def _common(a: str, b: str, cut: re.Pattern[str] | None = None) -> str:
  """What both begin with; with `cut`, in whole pieces between special tokens."""
  same = []
  for x, y in zip(*((cut.split(s) if cut else s) for s in (a, b)), strict=False):
    if x != y:
      break
    same.append(x)
  return "".join(same)


def _spelt(token: Any, what: str, name: str) -> str:
  """A token is a string in tokenizer_config.json, or an object that holds it."""
  spelt = token.get("content") if isinstance(token, dict) else token
  if not isinstance(spelt, str):
    raise InputError(f"tokenizer_config.json of {name} has {what} {token!r:.80}; it is a string")
  return spelt
