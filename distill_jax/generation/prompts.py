"""Prompts: read, rendered by a chat template, tokenized; those that cannot be used are named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from distill_jax.data import corpus, jsonl
from distill_jax.data.bad_input import BadInputPolicy
from distill_jax.data.chat_template import ChatTemplate
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.filters.samples import answer_part
from distill_jax.generation.job import GenerationJob
from distill_jax.runtime import json_io, storage
from distill_jax.types import JsonObject

SAMPLE_FIELDS = {"id", "sample", "text", "about"}  # of a line that `generate` wrote
PLACEHOLDER = "{prompt}"  # in generate.template

Message = JsonObject  # of a chat: its `role` and `content`


class Prompt(NamedTuple):
  """A prompt as it is published beside its samples.

  Attributes:
    content: text, or the messages of a chat; in generate.template.
    about: the other fields of its line.
  """

  content: str | list[Message]
  about: JsonObject


@dataclasses.dataclass(frozen=True)
class Prompts:
  """The prompts of a file, by number: their places among its lines that are not blank, from 0 on.

  Attributes:
    ids: the tokens of each prompt that can be used; empty where none were asked for.
    prompts: these prompts.
    rejected: for each prompt that cannot be used, the reason.
  """

  ids: dict[int, list[int]]
  prompts: dict[int, Prompt]
  rejected: dict[int, str]


def read_prompts(job: GenerationJob, tokenizer: Tokenizer | None = None) -> Prompts:
  """Reads all prompts of a job's file.

  A line that is a sample of an earlier run brings its `about` with it, and its text, where
  generate.field names it, without the reasoning: a text that a teacher was asked to rewrite is
  a prompt with the answer key of the old one.

  Args:
    tokenizer: None reads prompts of any length, without their tokens.

  Raises:
    InputError: the file cannot be read; a prompt cannot be used and on_bad is "stop", or none
      can be used.
  """
  path, policy = _check(job), BadInputPolicy(job.key("on_bad"), job.on_bad)
  prompts = Prompts({}, {}, {})
  encoder = PromptEncoder(job)
  for n, line in enumerate(jsonl.read_lines(path)):
    try:
      text = json_io.decode_utf8(line.raw.rstrip(b"\r\n"))
      prompt = _parse(text, job.field) if path.suffix == ".jsonl" else Prompt(text, {})
      prompt = prompt._replace(content=_apply_template(job, prompt.content))
      if tokenizer is not None:
        prompts.ids[n] = _check_length(encoder(tokenizer, prompt.content), job.decoding.cache_len)
      prompts.prompts[n] = prompt
    except InputError as error:
      policy.reject(line.where, str(error))
      prompts.rejected[n] = f"line {line.number}: {error}"
  if not prompts.prompts:
    reasons = [*prompts.rejected.values()]
    why = f"the first one's reason: {reasons[0]}" if reasons else "it is empty"
    raise InputError(f"{path} holds no prompt that can be used; {why}")
  return prompts


def _check(job: GenerationJob) -> Path:
  """The file of prompts."""
  if job.template and PLACEHOLDER not in job.template:
    raise InputError(
      f"generate.template is {job.template!r:.60}; it has {PLACEHOLDER} for the prompt"
    )
  path = storage.file(job.prompts)
  if not job.prompts or not path.is_file():
    raise InputError(f"generate.prompts is {job.prompts!r}, which is no file; name the prompts")
  return path


def model_input(job: GenerationJob, content: str | list[Message]) -> str | list[Message]:
  """A prompt as the model reads it: text to continue, or the messages of a chat."""
  if isinstance(content, str) and job.chat:
    return [{"role": "user", "content": content}]
  return content


class PromptEncoder:
  """Turns prompts into tokens.

  Text comes after what the tokenizer begins a text with, as documents do (data/corpus.py); chats
  are rendered by the model's template, which is read at the first chat.
  """

  def __init__(self, job: GenerationJob):
    self._job = job
    self._template: ChatTemplate | None = None

  def __call__(self, tokenizer: Tokenizer, content: str | list[Message]) -> list[int]:
    prompt = model_input(self._job, content)
    if isinstance(prompt, str):
      return [*tokenizer.begin, *tokenizer.encode(prompt)]
    if self._template is None:
      pretrained = None if self._job.data.tokenizer else self._job.source.pretrained
      self._template = corpus.template_of(self._job.data, pretrained)
    template = self._template
    text = template.render(prompt, add_generation_prompt=True)
    special = [*dict(template.tokens).values(), *template.added]
    return tokenizer.encode_places(text, special)[0]


def _apply_template(job: GenerationJob, content: Any) -> str | list[Message]:
  """Puts a prompt, or the last of its messages, into generate.template."""
  if isinstance(content, str) and content:
    return job.template.replace(PLACEHOLDER, content) if job.template else content
  if not isinstance(content, list) or not all(isinstance(m, dict) and "role" in m for m in content):
    raise InputError(
      f"field {job.field!r} holds {content!r:.60}; it is text, or messages with roles"
    )
  if not content:
    raise InputError(f"field {job.field!r} holds no message; a chat has at least one")
  if not job.template:
    return content
  last = content[-1]
  if not isinstance(last.get("content"), str):
    raise InputError("the last message has no text that generate.template could be put around")
  return [
    *content[:-1],
    last | {"content": job.template.replace(PLACEHOLDER, last["content"])},
  ]


def _check_length(ids: list[int], cache_len: int) -> list[int]:
  if not ids:
    raise InputError("the prompt has no tokens, and a model continues at least one")
  if len(ids) >= cache_len:
    raise InputError(
      f"the prompt has {len(ids)} tokens, and generate.cache_len {cache_len} leaves at most "
      f"{cache_len - 1} for it"
    )
  return ids


def _parse(text: str, field: str) -> Prompt:
  """What `field` of a line holds, unchecked, beside the other fields or a sample's `about`."""
  row = json_io.parse(text, "it")
  if not isinstance(row, dict) or field not in row:
    fields = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
    raise InputError(f"there is no field {field!r}, but {fields or 'nothing'}")
  if half := json_io.lone_surrogate(json.dumps(row, ensure_ascii=False)):
    raise InputError(f"it holds half a surrogate pair, {half!r}")
  value = row.pop(field)
  if not row.keys() | {field} >= SAMPLE_FIELDS or not isinstance(row["about"], dict):
    return Prompt(value, row)
  if field == "text" and isinstance(value, str):
    value = answer_part(value).strip()
  return Prompt(value, row["about"])
