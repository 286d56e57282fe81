"""Requests to OpenAI-compatible servers, and what is kept of their answers."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distill_jax.data import corpus, jsonl
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.generation.job import GenerationJob
from distill_jax.generation.prompts import Message, PromptEncoder, model_input
from distill_jax.generation.request_errors import RequestRefused
from distill_jax.generation.scheduler import SampleKey
from distill_jax.runtime import atomic_io, json_io
from distill_jax.types import JsonObject

RESPONSES, PART = "responses.jsonl", "responses.part.jsonl"
PREFIX = re.compile(rb'\{"id": (\d+), "sample": (\d+), ')  # of a line of responses.jsonl
EXTENDED_SERVERS = ("vllm", "sglang")  # they take fields beyond OpenAI's; in `owned_by`
TOKEN_ID = "token_id:"  # how vLLM spells tokens where it is asked for ids
REASONS = {"stop": "eos", "length": "length"}  # by finish_reason, generate's reason
BROKEN_OFF = (None, "abort", "error")  # finish_reason of an answer that the server gave up

TokenLogprobs = list[JsonObject]  # of each token, as chat completions have them


@dataclasses.dataclass(frozen=True)
class ServedModel:
  """A model on a server.

  Attributes:
    name: its name there.
    server: "vllm", "sglang", or "" for all others.
  """

  name: str
  server: str = ""

  @classmethod
  def from_answer(cls, answer: Any, name: str) -> ServedModel:
    """The model of that name in an answer to `models`; the only one where no name is given."""
    owners = {m["id"]: m.get("owned_by") for m in answer["data"]}
    if not name and len(owners) != 1:
      raise InputError(
        f"generate.server.model is empty and the server has {len(owners)} models "
        f"({', '.join([*owners][:5])}); name one"
      )
    model = name or next(iter(owners))
    return cls(model, owners[model] if owners.get(model) in EXTENDED_SERVERS else "")


def request(
  job: GenerationJob, served: ServedModel, content: str | list[Message], prompt: int, sample: int
) -> tuple[str, JsonObject]:
  """(path, body) of the request for one sample of a prompt."""
  given, top = model_input(job, content), job.server.top_logprobs
  is_text, sampling = isinstance(given, str), job.sampling
  digest = hashlib.sha256(f"{job.seed}/{prompt}/{sample}".encode()).digest()
  body: JsonObject = {
    "model": served.name,
    "prompt" if is_text else "messages": given,
    "max_tokens": job.max_new_tokens,
    "temperature": sampling.temperature,
    "top_p": sampling.top_p,
    "seed": int.from_bytes(digest[:4], "big") >> 1,  # some servers take 31 bits
  }
  if job.stop:
    body["stop"] = list(job.stop)
  if job.ignore_eos:
    body["ignore_eos"] = True
  if served.server:  # what is missing, these take from the model's generation_config.json
    body |= {"top_k": sampling.top_k or -1, "min_p": sampling.min_p, "repetition_penalty": 1.0}
  else:  # others may refuse fields that are not OpenAI's
    body |= {k: v for k, v in (("top_k", sampling.top_k), ("min_p", sampling.min_p)) if v}
  if served.server == "vllm":
    body["return_token_ids"] = True
  if top:
    body |= {"logprobs": top} if is_text else {"logprobs": True, "top_logprobs": top}
    if served.server == "vllm":
      body["return_tokens_as_token_ids"] = True
  body = {k: v for k, v in (body | job.server.extra).items() if v is not None}
  return "completions" if is_text else "chat/completions", body


def parse(answer: Any, stop: tuple[str, ...]) -> tuple[JsonObject, TokenLogprobs | None]:
  """(the fields of samples.jsonl that an answer has; its log-probabilities, None without).

  Raises:
    RequestRefused: a filter or a tool ended the text.
    KeyError, IndexError, TypeError, AttributeError, ValueError: it is malformed or broken off.
  """
  choice = answer["choices"][0]
  finish = choice.get("finish_reason")
  if finish in BROKEN_OFF:
    raise ValueError(f"finish_reason {finish!r}")
  if finish not in REASONS:
    raise RequestRefused(f"the server ends the text by {finish!r}")
  text = _text(choice["message"]) if "message" in choice else choice["text"]
  if json_io.lone_surrogate(text):
    raise ValueError("half a surrogate pair in the text")
  token_logprobs = _token_logprobs(choice)
  tokens = _tokens(choice, token_logprobs or [])
  usage = (answer.get("usage") or {}).get("completion_tokens")
  count = len(tokens or token_logprobs or []) if usage is None else int(usage)
  row = {"text": text, "tokens": tokens, "token_count": count, "reason": REASONS[finish]}
  if finish == "stop" and _is_stop_string(choice, stop):
    row["reason"] = "stop"
  if token_logprobs:
    logps = [float(x["logprob"]) for x in token_logprobs]
    if not all(map(math.isfinite, logps)):
      raise ValueError("a log-probability that is not finite")
    row |= {"logprob": sum(logps), "logprob_mean": sum(logps) / len(logps)}
  return row, token_logprobs


def _text(message: JsonObject) -> str:
  """The text of a message after its reasoning, as DeepSeek-R1 writes them."""
  reasoning = message.get("reasoning_content") or message.get("reasoning")
  content = message["content"] or ""
  if not reasoning:
    return content
  begun = "<think>\n" + reasoning.strip("\n")
  return f"{begun}\n</think>\n\n" + content.lstrip("\n") if content else begun


def _tokens(choice: JsonObject, token_logprobs: TokenLogprobs) -> list[int]:
  """The ids of a text's tokens; [] where the server does not give them."""
  if ids := choice.get("token_ids"):
    return ids
  names = [x["token"] for x in token_logprobs]
  if not all(name.startswith(TOKEN_ID) for name in names):
    return []
  return [int(name.removeprefix(TOKEN_ID)) for name in names]


def _is_stop_string(choice: JsonObject, stop: tuple[str, ...]) -> bool:
  """Whether a stop string ended a text, and not the model."""
  for key in ("stop_reason", "matched_stop"):  # vLLM's, SGLang's
    if key in choice:
      return isinstance(choice[key], str) and choice[key] in stop
  return bool(stop)


def _token_logprobs(choice: JsonObject) -> TokenLogprobs | None:
  """The log-probabilities of each token, those of text completions in the form of chats."""
  logprobs = choice.get("logprobs")
  if not logprobs or logprobs.get("content") is not None:
    return logprobs["content"] if logprobs else None
  if logprobs.get("tokens") is None:
    return None
  tokens = logprobs["tokens"]
  tops = logprobs.get("top_logprobs") or [None] * len(tokens)
  return [
    {
      "token": token,
      "logprob": logprob,
      "top_logprobs": [{"token": k, "logprob": x} for k, x in (top or {}).items()],
    }
    for token, logprob, top in zip(tokens, logprobs["token_logprobs"], tops, strict=True)
  ]


class PromptIds:
  """The tokens of prompts: as the server gives them, else by the model's tokenizer here."""

  def __init__(self, job: GenerationJob):
    self._job = job
    self._encoder = PromptEncoder(job)
    self._tokenizer: Tokenizer | None = None

  def __call__(self, content: str | list[Message], answer: Any) -> list[int]:
    """The tokens of a prompt that was answered.

    Raises:
      InputError: there is no tokenizer here, or it is not the server's.
    """
    ids = answer.get("prompt_token_ids") or answer["choices"][0].get("prompt_token_ids")
    if ids:
      return ids
    if self._tokenizer is None:
      self._tokenizer = self._read_tokenizer()
    ids = self._encoder(self._tokenizer, content)
    count = (answer.get("usage") or {}).get("prompt_tokens", len(ids))
    if count != len(ids):
      raise InputError(
        f"the server reads {count} tokens where {self._tokenizer.where} makes {len(ids)} of a "
        "prompt; take the tokenizer, chat template and beginning of a text that the server has"
      )
    return ids

  def _read_tokenizer(self) -> Tokenizer:
    data = self._job.data
    try:
      pretrained = None if data.tokenizer else self._job.source.pretrained
      return corpus.tokenizer_of(data, pretrained)
    except InputError as e:
      raise InputError(f"the server does not say the tokens of a prompt, and {e}") from e


class Responses:
  """The answers so far, on disk before the samples made of them; a context manager.

  A line begins with the numbers of its prompt and sample. Of two with the same numbers, the last
  is the one that a sample was made of: killed in between, a run makes the request again.
  """

  def __init__(self, folder: Path):
    self._folder, self._file = folder, (folder / PART).open("a+b")
    self._spans: dict[SampleKey, tuple[int, int]] = {}  # (offset, length) of each line
    self._end = 0
    self._file.seek(0)
    for line in self._file:
      if not line.endswith(b"\n"):
        self._file.truncate(self._end)
        break
      self._index(line)

  def _index(self, line: bytes) -> None:
    if not (match := PREFIX.match(line)):
      raise InputError(
        f"{self._folder / PART} is damaged at byte {self._end}; choose another --workdir"
      )
    self._spans[int(match[1]), int(match[2])] = self._end, len(line)
    self._end += len(line)

  def check(self, samples: Iterable[SampleKey]) -> None:
    """Refuses a folder in which the answer of a sample is missing."""
    if lost := [key for key in samples if key not in self._spans]:
      raise InputError(
        f"{self._folder} has {len(lost)} samples whose answers are not in {PART}; bring the file "
        "back or choose another --workdir"
      )

  def add(self, answers: list[JsonObject]) -> None:
    """Appends answers. Returns when all is on disk."""
    lines = [jsonl.to_line(answer, ensure_ascii=True) for answer in answers]
    self._file.write(b"".join(lines))
    self._file.flush()
    os.fsync(self._file.fileno())
    for line in lines:
      self._index(line)

  def publish(self, order: Iterable[SampleKey]) -> None:
    """Writes responses.jsonl, whole or not at all."""
    part = self._folder / f".{RESPONSES}.part"
    with part.open("wb") as f:
      for offset, size in (self._spans[key] for key in order):
        self._file.seek(offset)
        f.write(self._file.read(size))
      f.flush()
      os.fsync(f.fileno())
    part.replace(self._folder / RESPONSES)
    atomic_io.fsync_dir(self._folder)

  def remove(self) -> None:
    (self._folder / PART).unlink()

  def __enter__(self) -> Responses:
    return self

  def __exit__(self, *_: object) -> None:
    self._file.close()
