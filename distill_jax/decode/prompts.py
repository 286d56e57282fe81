"""Prompts: read, written out by a chat template, cut into tokens; what cannot be used is named."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill_jax import build
from distill_jax.config import Config
from distill_jax.data.chat import ChatTemplate
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.hub import load

ON_BAD = ("stop", "skip")
HALF = re.compile("[\ud800-\udfff]")  # of a pair: JSON can spell it, and it is no character


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Attributes:
  ids: the tokens of each prompt, by its number: its place among the file's lines that are
    not blank, from 0 on.
  said: the prompt itself, text or messages, and the other fields of its line.
  rejected: for each prompt that cannot be used, why.
  """

  ids: dict[int, list[int]]
  said: dict[int, tuple[Any, dict[str, Any]]]
  rejected: dict[int, str]


def read(config: Config, tokenizer: Tokenizer) -> Prompts:
  """All prompts of a config's file.

  Raises:
    InputError: the file cannot be read; a prompt cannot be used and generate.on_bad is "stop",
      or none can.
  """
  c = config.generate
  if c.on_bad not in ON_BAD:
    raise InputError(f"generate.on_bad is {c.on_bad!r}; it can be one of {ON_BAD}")
  path = Path(c.prompts)
  if not c.prompts or not path.is_file():
    raise InputError(f"generate.prompts is {c.prompts!r}, which is no file; name the prompts")
  ids: dict[int, list[int]] = {}
  said: dict[int, tuple[Any, dict[str, Any]]] = {}
  rejected: dict[int, str] = {}
  template = _Template(config)
  for n, (line, raw) in enumerate(_lines(path)):
    try:
      said[n] = _value(raw, c.field) if path.suffix == ".jsonl" else (_text(raw), {})
      ids[n] = _ids(config, template, tokenizer, said[n][0])
    except InputError as error:
      if c.on_bad == "stop":
        raise InputError(
          f"{path}, line {line}: {error}; mend it, or set generate.on_bad=skip"
        ) from error
      rejected[n] = f"line {line}: {error}"
  if not ids:
    why = f"the first one's reason: {next(iter(rejected.values()))}" if rejected else "it is empty"
    raise InputError(f"{path} holds no prompt that can be used; {why}")
  return Prompts(ids, said, rejected)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
  with path.open("rb") as f:
    for number, raw in enumerate(f, 1):
      if raw.strip():
        yield number, raw.rstrip(b"\r\n")


class _Template:
  """The teacher's chat template, read where the first chat is."""

  def __init__(self, config: Config):
    self._config = config
    self._template: ChatTemplate | None = None

  def ids(self, tokenizer: Tokenizer, messages: Any) -> list[int]:
    if self._template is None:
      self._template = self._read()
    t = self._template
    text = t.render(messages, add_generation_prompt=True)
    return tokenizer.encode_places(text, [*dict(t.tokens).values(), *t.added])[0]

  def _read(self) -> ChatTemplate:
    path = Path(self._config.data.tokenizer)
    if self._config.data.tokenizer:
      name, files = str(path), load.read_tokenizer(path if path.is_dir() else path.parent)
    else:
      came = build.pretrained(self._config.teacher)
      name, files = (came.source, came.tokenizer) if came else ("a random model", None)
    if files is None:
      raise InputError(f"{name} brings no tokenizer, and so no chat template; give one that does")
    return ChatTemplate.of(files, name)


def _ids(config: Config, template: _Template, tokenizer: Tokenizer, said: Any) -> list[int]:
  c = config.generate
  if isinstance(said, str) and c.chat:
    said = [{"role": "user", "content": said}]
  if isinstance(said, str):
    ids = tokenizer.encode(said)
  elif isinstance(said, list) and all(isinstance(m, dict) and "role" in m for m in said):
    ids = template.ids(tokenizer, said)
  else:
    raise InputError(f"field {c.field!r} holds {said!r:.60}; it is text, or messages with roles")
  if not ids:
    raise InputError("the prompt has no tokens, and a model goes on from at least one")
  if len(ids) >= c.cache_len:
    raise InputError(
      f"the prompt has {len(ids)} tokens, and generate.cache_len {c.cache_len} leaves at most "
      f"{c.cache_len - 1} for it"
    )
  return ids


def _text(raw: bytes) -> str:
  try:
    return raw.decode()
  except UnicodeDecodeError as e:
    raise InputError(f"byte {e.start} is 0x{raw[e.start]:02x}, which is not UTF-8") from e


def _value(raw: bytes, field: str) -> tuple[Any, dict[str, Any]]:
  """(what a field of the line holds, the other fields)."""
  try:
    row = json.loads(_text(raw))
  except (ValueError, RecursionError) as e:
    raise InputError(f"it is not JSON ({e})") from e
  if not isinstance(row, dict) or field not in row:
    there = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
    raise InputError(f"there is no field {field!r}, but {there or 'nothing'}")
  if half := HALF.search(json.dumps(row, ensure_ascii=False)):
    raise InputError(f"it holds half a surrogate pair, {half[0]!r}")
  return row.pop(field), row
