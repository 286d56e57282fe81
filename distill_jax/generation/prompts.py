"""Prompts: read, written out by a chat template, cut into tokens; what cannot be used is named."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill_jax.config import Config
from distill_jax.data import corpus
from distill_jax.data.chat_template import ChatTemplate
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.filters.samples import answer_part
from distill_jax.generation.options import GenerateOptions
from distill_jax.models import loading
from distill_jax.runtime import storage

ON_BAD = ("stop", "skip")
SAMPLE = {"id", "sample", "text", "about"}  # fields of a line that `generate` wrote
PLACE = "{prompt}"  # in generate.template
HALF = re.compile("[\ud800-\udfff]")  # of a pair: JSON can spell it, and it is no character


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Attributes:
  ids: the tokens of each prompt, by its number: its place among the file's lines that are
    not blank, from 0 on.
  said: the prompt itself, text or messages, in generate.template; and the other fields of its
    line.
  rejected: for each prompt that cannot be used, why.
  """

  ids: dict[int, list[int]]
  said: dict[int, tuple[Any, dict[str, Any]]]
  rejected: dict[int, str]


def read(config: Config, tokenizer: Tokenizer | None = None) -> Prompts:
  """All prompts of a config's file.

  A line that is a sample of an earlier run brings that one's `about` with it, and its text,
  where generate.field names it, without the reasoning: what a teacher was asked to rewrite is
  a prompt with the answer key of the old one.

  Args:
    tokenizer: None: there are no ids, and prompts of any length.

  Raises:
    InputError: the file cannot be read; a prompt cannot be used and generate.on_bad is "stop",
      or none can.
  """
  c = config.generate
  if c.on_bad not in ON_BAD:
    raise InputError(f"generate.on_bad is {c.on_bad!r}; it can be one of {ON_BAD}")
  if c.template and PLACE not in c.template:
    raise InputError(f"generate.template is {c.template!r:.60}; it has {PLACE} for the prompt")
  path = storage.file(c.prompts)
  if not c.prompts or not path.is_file():
    raise InputError(f"generate.prompts is {c.prompts!r}, which is no file; name the prompts")
  ids: dict[int, list[int]] = {}
  said: dict[int, tuple[Any, dict[str, Any]]] = {}
  rejected: dict[int, str] = {}
  cut = Cut(config)
  for n, (line, raw) in enumerate(_lines(path)):
    try:
      prompt, about = _value(raw, c.field) if path.suffix == ".jsonl" else (_text(raw), {})
      prompt = _in_template(c, prompt)
      if tokenizer is not None:
        ids[n] = _fitting(cut(tokenizer, prompt), c.cache_len)
      said[n] = prompt, about
    except InputError as error:
      if c.on_bad == "stop":
        raise InputError(
          f"{path}, line {line}: {error}; mend it, or set generate.on_bad=skip"
        ) from error
      rejected[n] = f"line {line}: {error}"
  if not said:
    why = f"the first one's reason: {next(iter(rejected.values()))}" if rejected else "it is empty"
    raise InputError(f"{path} holds no prompt that can be used; {why}")
  return Prompts(ids, said, rejected)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
  with path.open("rb") as f:
    for number, raw in enumerate(f, 1):
      if raw.strip():
        yield number, raw.rstrip(b"\r\n")


def asked(c: GenerateOptions, said: Any) -> Any:
  """A prompt as the teacher reads it: text to go on from, or messages."""
  if isinstance(said, str) and c.chat:
    return [{"role": "user", "content": said}]
  return said


class Cut:
  """Cuts prompts into tokens.

  Text comes after what the tokenizer begins a text with, as documents do (corpus.py); chats are
  written by the teacher's template, which is read where the first chat is.
  """

  def __init__(self, config: Config):
    self._config = config
    self._template: ChatTemplate | None = None

  def __call__(self, tokenizer: Tokenizer, said: Any) -> list[int]:
    said = asked(self._config.generate, said)
    if isinstance(said, str):
      return [*tokenizer.begin, *tokenizer.encode(said)]
    if self._template is None:
      pretrained = None if self._config.data.tokenizer else loading.pretrained(self._config.teacher)
      self._template = corpus.template_of(self._config.data, pretrained)
    t = self._template
    text = t.render(said, add_generation_prompt=True)
    return tokenizer.encode_places(text, [*dict(t.tokens).values(), *t.added])[0]


def _in_template(c: GenerateOptions, prompt: Any) -> Any:
  """A prompt, or the last of its messages, in generate.template."""
  if isinstance(prompt, str) and prompt:
    return c.template.replace(PLACE, prompt) if c.template else prompt
  if not isinstance(prompt, list) or not all(isinstance(m, dict) and "role" in m for m in prompt):
    raise InputError(f"field {c.field!r} holds {prompt!r:.60}; it is text, or messages with roles")
  if not prompt:
    raise InputError(f"field {c.field!r} holds no message; a chat has at least one")
  if not c.template:
    return prompt
  last = prompt[-1]
  if not isinstance(last.get("content"), str):
    raise InputError("the last message has no text that generate.template could be put around")
  return [*prompt[:-1], last | {"content": c.template.replace(PLACE, last["content"])}]


def _fitting(ids: list[int], cache_len: int) -> list[int]:
  if not ids:
    raise InputError("the prompt has no tokens, and a model goes on from at least one")
  if len(ids) >= cache_len:
    raise InputError(
      f"the prompt has {len(ids)} tokens, and generate.cache_len {cache_len} leaves at most "
      f"{cache_len - 1} for it"
    )
  return ids


def _text(raw: bytes) -> str:
  try:
    return raw.decode()
  except UnicodeDecodeError as e:
    raise InputError(f"byte {e.start} is 0x{raw[e.start]:02x}, which is not UTF-8") from e


def _value(raw: bytes, field: str) -> tuple[Any, dict[str, Any]]:
  """(what a field of the line holds; the other fields, or a sample's `about`)."""
  try:
    row = json.loads(_text(raw))
  except (ValueError, RecursionError) as e:
    raise InputError(f"it is not JSON ({e})") from e
  if not isinstance(row, dict) or field not in row:
    there = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
    raise InputError(f"there is no field {field!r}, but {there or 'nothing'}")
  if half := HALF.search(json.dumps(row, ensure_ascii=False)):
    raise InputError(f"it holds half a surrogate pair, {half[0]!r}")
  value = row.pop(field)
  if not row.keys() | {field} >= SAMPLE or not isinstance(row["about"], dict):
    return value, row
  is_said = field == "text" and isinstance(value, str)
  return answer_part(value).strip() if is_said else value, row["about"]
