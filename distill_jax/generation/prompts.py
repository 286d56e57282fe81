"""Reading prompts, rendering them with a chat template, and tokenizing them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from distill_jax.data import corpus, jsonl
from distill_jax.data.bad_input import BadInputPolicy
from distill_jax.data.chat_template import ChatTemplate
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError, bad_value
from distill_jax.filters.samples import answer_part
from distill_jax.generation.job import GenerationJob
from distill_jax.runtime import json_io, storage
from distill_jax.types import JsonObject

SAMPLE_FIELDS = {"id", "sample", "text", "about"}  # fields of a line that `generate` wrote
PLACEHOLDER = "{prompt}"  # in generate.template

Message = JsonObject  # a chat message with `role` and `content`


class Prompt(NamedTuple):
  """A prompt.

  Attributes:
    content: Text or chat messages, with generate.template applied.
    about: The other fields of the prompt's line.
  """

  content: str | list[Message]
  about: JsonObject


@dataclasses.dataclass(frozen=True)
class Prompts:
  """The prompts of a file by index. The index counts the lines that are not blank, from 0.

  Attributes:
    ids: The tokens of each prompt that can be used; empty if they were not requested.
    prompts: The prompts that can be used.
    rejected: The reason for each prompt that cannot be used.
  """

  ids: dict[int, list[int]]
  prompts: dict[int, Prompt]
  rejected: dict[int, str]


def read_prompts(job: GenerationJob, tokenizer: Tokenizer | None = None) -> Prompts:
  """Reads the prompts of a job's file.

  A line may be a sample of an earlier run. With generate.field="text", its text without the
  reasoning is the prompt. Its `about` is carried over, so that e.g. a question that a teacher has
  rewritten keeps its answer key.

  Args:
    job: The job.
    tokenizer: The tokenizer. None: prompts are not tokenized and may have any length.

  Raises:
    InputError: If the file cannot be read, if a prompt cannot be used and on_bad is "stop", or if
      no prompt can be used.
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
    if not prompts.rejected:
      raise InputError(f"{path} is empty. Add prompts to it.")
    first = next(iter(prompts.rejected.values())).rstrip(".")
    raise InputError(f"{path} has no prompt that can be used. The first problem: {first}.")
  return prompts


def _check(job: GenerationJob) -> Path:
  """Returns the file of prompts, after checking the job's settings for prompts."""
  if job.template and PLACEHOLDER not in job.template:
    raise bad_value(
      "generate.template",
      job.template,
      f"a template that contains {PLACEHOLDER}",
      f"Add {PLACEHOLDER} to it",
    )
  path = storage.file(job.prompts)
  if not job.prompts or not path.is_file():
    raise bad_value("generate.prompts", job.prompts, "an existing file", "Name a file of prompts")
  return path


def model_input(job: GenerationJob, content: str | list[Message]) -> str | list[Message]:
  """Returns a prompt as text to continue, or as the messages of a chat.

  With job.chat, a text becomes a user's message.
  """
  if isinstance(content, str) and job.chat:
    return [{"role": "user", "content": content}]
  return content


class PromptEncoder:
  """Tokenizes prompts.

  Texts begin with the tokens that the tokenizer puts first, as documents do (data/corpus.py). Chats
  are rendered by the chat template, which is read at the first chat.

  Args:
    job: The job.
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
  """Applies generate.template to a prompt, or to the last of its messages.

  Raises:
    InputError: If the prompt is malformed.
  """
  if isinstance(content, str) and content:
    return job.template.replace(PLACEHOLDER, content) if job.template else content
  if not isinstance(content, list) or not all(isinstance(m, dict) and "role" in m for m in content):
    raise InputError(
      f"Field {job.field!r} is {content!r:.60}; expected a text, or messages with roles."
    )
  if not content:
    raise InputError(f"Field {job.field!r} is an empty list; expected at least one message.")
  if not job.template:
    return content
  last = content[-1]
  if not isinstance(last.get("content"), str):
    raise InputError("The last message has no text, so the template cannot be applied.")
  return [
    *content[:-1],
    last | {"content": job.template.replace(PLACEHOLDER, last["content"])},
  ]


def _check_length(ids: list[int], cache_len: int) -> list[int]:
  if not ids:
    raise InputError("The prompt has no tokens; expected at least one.")
  if len(ids) >= cache_len:
    raise InputError(
      f"The prompt has {len(ids)} tokens; expected at most {cache_len - 1}, since "
      f"generate.cache_len is {cache_len}."
    )
  return ids


def _parse(text: str, field: str) -> Prompt:
  """Returns the prompt in a field of a line, unchecked.

  Its `about` is that of a sample, or the other fields of another line.

  Raises:
    InputError: If the line is not a JSON object with this field.
  """
  row = json_io.parse(text, "The line")
  if not isinstance(row, dict):
    raise InputError(f"The line is a JSON {type(row).__name__}; expected an object.")
  if field not in row:
    names = ", ".join(map(repr, row)) or "no fields"
    raise InputError(f"The line has no field {field!r} (it has {names}).")
  if half := json_io.lone_surrogate(json.dumps(row, ensure_ascii=False)):
    raise InputError(f"The line contains half a surrogate pair, {half!r}.")
  value = row.pop(field)
  if not row.keys() | {field} >= SAMPLE_FIELDS or not isinstance(row["about"], dict):
    return Prompt(value, row)
  if field == "text" and isinstance(value, str):
    value = answer_part(value).strip()
  return Prompt(value, row["about"])
