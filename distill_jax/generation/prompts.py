"""Reading prompts, rendering them with a chat template, and tokenizing them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from distill_jax.data import corpus, jsonl
from distill_jax.data.bad_input import BadInputPolicy
from distill_jax.data.chat_template import ChatTemplate
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError, bad_value
from distill_jax.filters.samples import answer_part
from distill_jax.generation.finished import ALL, Done
from distill_jax.generation.job import GenerationJob
from distill_jax.runtime import files, json_io
from distill_jax.types import JsonObject

SAMPLE_FIELDS = {"id", "sample", "text", "about"}  # fields of a line that `generate` wrote
PLACEHOLDER = "{prompt}"  # in generate.template

Message = JsonObject  # a chat message with `role` and `content`


class Prompt(NamedTuple):
  """A prompt, or the reason why it cannot be used.

  Attributes:
    number: The index of the prompt, which counts the lines that are not blank, from 0. The files of
      a folder are counted together, in the order of their names.
    content: Text or chat messages, with generate.template applied.
    about: The other fields of the prompt's line; with generate.template, also `prompt`, the prompt
      without the template, unless there is such a field.
    ids: The tokens; () if the job is read without a tokenizer.
    rejected: The reason why the prompt cannot be used; "" if it can.
  """

  number: int
  content: str | list[Message]
  about: JsonObject
  ids: Sequence[int] = ()
  rejected: str = ""


class Summary(NamedTuple):
  """The numbers and the digest of all prompts.

  Attributes:
    prompts: The number of prompts that can be used.
    rejected: The number of prompts that cannot be used.
    digest: The sha256 of the prompts that can be used, in hex.
  """

  prompts: int
  rejected: int
  digest: str


class Prompts:
  """The prompts of a job, which are read as a stream; no more than one is in memory.

  A line may be a sample of an earlier run. With generate.field="text", its text without the
  reasoning is the prompt. Its `about` is carried over, so that e.g. a question that a teacher has
  rewritten keeps its answer key.

  Args:
    job: The job.
    tokenizer: The tokenizer. None: prompts are not tokenized and may have any length.

  Attributes:
    files: The paths or URLs of the files of prompts.

  Raises:
    InputError: If the template is invalid or there is no file of prompts.
  """

  def __init__(self, job: GenerationJob, tokenizer: Tokenizer | None = None):
    self._job, self._tokenizer = job, tokenizer
    self._encoder = PromptEncoder(job)
    self.files = _files(job)

  def summary(self, visit: Callable[[Prompt, jsonl.Line], None] | None = None) -> Summary:
    """Reads all prompts once.

    Args:
      visit: Called with each prompt, and its line. None: not called.

    Raises:
      InputError: If the file cannot be read, if a prompt cannot be used and on_bad is "stop", or if
        no prompt can be used.
    """
    policy = BadInputPolicy(self._job.key("on_bad"), self._job.on_bad)
    digest, used, first = hashlib.sha256(), 0, ""
    for prompt, line in self._read(0):
      if visit is not None:
        visit(prompt, line)
      if prompt.rejected:
        policy.reject(line.where, prompt.rejected.partition(": ")[2])
        first = first or prompt.rejected.rstrip(".")
        continue
      used += 1
      asked = list(prompt.ids) if self._tokenizer else prompt.content
      digest.update(json.dumps([prompt.number, asked, prompt.about]).encode() + b"\n")
    if not used:
      if not first:
        raise InputError(f"{self._job.prompts} is empty. Add prompts to it.")
      raise InputError(
        f"{self._job.prompts} has no prompt that can be used. The first problem: {first}."
      )
    return Summary(used, policy.counts.total(), digest.hexdigest())

  def read(self, first: int = 0) -> Iterator[Prompt]:
    """Yields the prompts with an index of at least `first`, including those that cannot be used."""
    return (prompt for prompt, _ in self._read(first))

  def _read(self, first: int) -> Iterator[tuple[Prompt, jsonl.Line]]:
    for n, line in enumerate(jsonl.read_lines(*self.files, skip_bom=True)):
      if n >= first:
        yield self.parse(n, line), line

  def parse(self, n: int, line: jsonl.Line) -> Prompt:
    """Returns the prompt with index `n`, which is on `line`."""
    try:
      return self._parse(n, line)
    except InputError as error:
      return Prompt(n, "", {}, rejected=f"line {line.number}: {error}")

  def _parse(self, n: int, line: jsonl.Line) -> Prompt:
    job = self._job
    text = json_io.decode_utf8(line.raw.rstrip(b"\r\n"))
    value, about = _parse(text, job.field) if str(line.file).endswith(".jsonl") else (text, {})
    content = _apply_template(job, value)
    if job.template:  # the filter `code` needs the beginning of the program
      about = {"prompt": value} | about
    if self._tokenizer is None:
      return Prompt(n, content, about)
    ids = _check_length(self._encoder(self._tokenizer, content), job.decoding.cache_len)
    return Prompt(n, content, about, ids)


def missing_samples(
  prompts: Iterable[Prompt], samples: int, done: Done
) -> Iterator[tuple[Prompt, int]]:
  """Yields the samples that are not finished; for a prompt that cannot be used, (prompt, ALL).

  Args:
    prompts: The prompts.
    samples: The number of samples per prompt.
    done: The finished samples.
  """
  for prompt in prompts:
    for sample in (ALL,) if prompt.rejected else range(samples):
      if not done.has((prompt.number, sample)):
        yield prompt, sample


def _files(job: GenerationJob) -> list[str]:
  """Returns the files of prompts, after checking the job's settings for prompts."""
  if job.template and PLACEHOLDER not in job.template:
    raise bad_value(
      "generate.template",
      job.template,
      f"a template that contains {PLACEHOLDER}",
      f"Add {PLACEHOLDER} to it",
    )
  is_file = bool(job.prompts) and files.info(job.prompts) is not None
  found = files.listing(job.prompts) if job.prompts and not is_file else {}
  if packed := [n for n in (job.prompts, *found) if n.endswith(jsonl.GZIP)]:
    expected = "files that are not compressed, because lines are read by their places"
    raise bad_value("generate.prompts", packed[0], expected, "Unpack it")
  if is_file:
    return [job.prompts]
  for suffix in (".jsonl", ".txt"):
    if names := [name for name in found if name.endswith(suffix)]:
      return [files.join(job.prompts, name) for name in names]
  raise bad_value(
    job.key("prompts"),
    job.prompts,
    "an existing file, or a folder of .jsonl or .txt files",
    "Name a file of prompts",
  )


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
    return chat_tokens(tokenizer, self._template, prompt)


def chat_tokens(tokenizer: Tokenizer, template: ChatTemplate, messages: list[Message]) -> list[int]:
  """Returns the tokens of a chat, up to where the assistant's next message begins."""
  text = template.render(messages, add_generation_prompt=True)
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


def _parse(text: str, field: str) -> tuple[Any, JsonObject]:
  """Returns the prompt in a field of a line, unchecked, and what is to be kept about it.

  This is the `about` of a sample, or the other fields of another line.

  Raises:
    InputError: If the line is not a JSON object with this field.
  """
  row = json_io.parse(text, "The line")
  if not isinstance(row, dict):
    raise InputError(f"The line is a JSON {type(row).__name__}; expected an object.")
  if field not in row:
    names = ", ".join(map(repr, row)) or "no fields"
    raise InputError(f"The line has no field {field!r} (it has {names}). See generate.field.")
  if half := json_io.lone_surrogate(json.dumps(row, ensure_ascii=False)):
    raise InputError(f"The line contains half a surrogate pair, {half!r}.")
  value = row.pop(field)
  if not row.keys() | {field} >= SAMPLE_FIELDS or not isinstance(row["about"], dict):
    return value, row
  if field == "text" and isinstance(value, str):
    value = answer_part(value).strip()
  return value, row["about"]
