"""What OpenAI-compatible servers are asked, and what is kept of what they answer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distill_jax.config import Config
from distill_jax.data import corpus
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.generation import prompts as reading
from distill_jax.generation.http_client import Refused
from distill_jax.generation.scheduler import SampleKey
from distill_jax.models import loading
from distill_jax.runtime import atomic_io

RESPONSES, PART = "responses.jsonl", "responses.part.jsonl"
PREFIX = re.compile(rb'\{"id": (\d+), "sample": (\d+), ')  # of a line of responses.jsonl
OWN = ("vllm", "sglang")  # who take fields beside OpenAI's, and say so in `owned_by`
TOKEN_ID = "token_id:"  # how vLLM spells tokens where it is asked for ids
ENDS = {"stop": "eos", "length": "length"}  # finish_reason: generate's reason
RETRY = (None, "abort", "error")  # of an answer that the server itself broke off


@dataclasses.dataclass(frozen=True)
class Served:
  """Attributes:
  model: its name.
  by: "vllm", "sglang", or "" for all others.
  """

  model: str
  by: str = ""

  @classmethod
  def of(cls, answer: Any, name: str) -> Served:
    """From the answer to `models`; the only model there where no name is given."""
    owners = {m["id"]: m.get("owned_by") for m in answer["data"]}
    if not name and len(owners) != 1:
      raise InputError(
        f"generate.server.model is empty and the server has {len(owners)} models "
        f"({', '.join([*owners][:5])}); name one"
      )
    model = name or next(iter(owners))
    return cls(model, owners[model] if owners.get(model) in OWN else "")


def request(
  config: Config, served: Served, said: Any, prompt: int, sample: int
) -> tuple[str, dict[str, Any]]:
  """(path, body) of the request for one sample."""
  c, said = config.generate, reading.asked(config.generate, said)
  digest = hashlib.sha256(f"{config.seed}/{prompt}/{sample}".encode()).digest()
  text, top = isinstance(said, str), c.server.top_logprobs
  body: dict[str, Any] = {
    "model": served.model,
    "prompt" if text else "messages": said,
    "max_tokens": c.max_new_tokens,
    "temperature": c.temperature,
    "top_p": c.top_p,
    "seed": int.from_bytes(digest[:4], "big") >> 1,  # some servers take 31 bits
  }
  if c.stop:
    body["stop"] = list(c.stop)
  if c.ignore_eos:
    body["ignore_eos"] = True
  if served.by:  # what is left out, these take from the model's generation_config.json
    body |= {"top_k": c.top_k or -1, "min_p": c.min_p, "repetition_penalty": 1.0}
  else:  # others may refuse what is not OpenAI's
    body |= {k: v for k, v in (("top_k", c.top_k), ("min_p", c.min_p)) if v}
  if served.by == "vllm":
    body["return_token_ids"] = True
  if top:
    body |= {"logprobs": top} if text else {"logprobs": True, "top_logprobs": top}
    if served.by == "vllm":
      body["return_tokens_as_token_ids"] = True
  body = {k: v for k, v in (body | c.server.extra).items() if v is not None}
  return "completions" if text else "chat/completions", body


def read(answer: Any, stop: tuple[str, ...]) -> tuple[dict[str, Any], list[dict[str, Any]] | None]:
  """(what samples.jsonl says of an answer, its log-probabilities as chats have them, or None).

  Raises:
    Refused: a filter or a tool ended it.
    KeyError, IndexError, TypeError, AttributeError, ValueError: it is none, or broken off.
  """
  choice = answer["choices"][0]
  finish = choice.get("finish_reason")
  if finish in RETRY:
    raise ValueError(f"finish_reason {finish!r}")
  if finish not in ENDS:
    raise Refused(f"the server ends the text by {finish!r}")
  text = _text(choice["message"]) if "message" in choice else choice["text"]
  if reading.HALF.search(text):
    raise ValueError("half a surrogate pair in the text")
  content = _content(choice)
  tokens = choice.get("token_ids") or []
  if not tokens and content and all(x["token"].startswith(TOKEN_ID) for x in content):
    tokens = [int(x["token"].removeprefix(TOKEN_ID)) for x in content]
  used = (answer.get("usage") or {}).get("completion_tokens")
  count = len(tokens or content or []) if used is None else int(used)
  row = {"text": text, "tokens": tokens, "token_count": count, "reason": ENDS[finish]}
  if finish == "stop" and _by_string(choice, stop):
    row["reason"] = "stop"
  if content:
    logps = [float(x["logprob"]) for x in content]
    if not all(map(math.isfinite, logps)):
      raise ValueError("a log-probability that is not finite")
    row |= {"logprob": sum(logps), "logprob_mean": sum(logps) / len(logps)}
  return row, content


def _text(message: dict[str, Any]) -> str:
  """Reasoning and what follows it, as DeepSeek-R1 writes them."""
  reasoning = message.get("reasoning_content") or message.get("reasoning")
  content = message["content"] or ""
  if not reasoning:
    return content
  said = "<think>\n" + reasoning.strip("\n")
  return f"{said}\n</think>\n\n" + content.lstrip("\n") if content else said


def _by_string(choice: dict[str, Any], stop: tuple[str, ...]) -> bool:
  """Whether a stop string ended a text, and not the model."""
  for key in ("stop_reason", "matched_stop"):  # vLLM's, SGLang's
    if key in choice:
      return isinstance(choice[key], str) and choice[key] in stop
  return bool(stop)


def _content(choice: dict[str, Any]) -> list[dict[str, Any]] | None:
  """Log-probabilities of each token as chats have them, from those of completions too."""
  said = choice.get("logprobs")
  if not said or said.get("content") is not None:
    return said["content"] if said else None
  if said.get("tokens") is None:
    return None
  tops = said.get("top_logprobs") or [None] * len(said["tokens"])
  entries = lambda top: [{"token": k, "logprob": x} for k, x in (top or {}).items()]
  return [
    {"token": token, "logprob": x, "top_logprobs": entries(top)}
    for token, x, top in zip(said["tokens"], said["token_logprobs"], tops, strict=True)
  ]


class PromptIds:
  """The tokens of prompts: what the server says, else by the teacher's tokenizer here."""

  def __init__(self, config: Config):
    self._config = config
    self._cut = reading.Cut(config)
    self._tokenizer: Tokenizer | None = None

  def of(self, said: Any, answer: Any) -> list[int]:
    """Raises: InputError: there is no tokenizer here, or it is not the server's."""
    told = answer.get("prompt_token_ids") or answer["choices"][0].get("prompt_token_ids")
    if told:
      return told
    if self._tokenizer is None:
      try:
        data, teacher = self._config.data, self._config.teacher
        pretrained = None if data.tokenizer else loading.pretrained(teacher)
        self._tokenizer = corpus.tokenizer_of(data, pretrained)
      except InputError as e:
        raise InputError(f"the server does not say the tokens of a prompt, and {e}") from e
    ids = self._cut(self._tokenizer, said)
    count = (answer.get("usage") or {}).get("prompt_tokens", len(ids))
    if count != len(ids):
      raise InputError(
        f"the server reads {count} tokens where {self._tokenizer.where} makes {len(ids)} of a "
        "prompt; take the tokenizer, chat template and beginning of a text that the server has"
      )
    return ids


class Responses:
  """The answers so far, on disk before the samples that came of them; a context manager.

  A line begins with the numbers of its prompt and sample. Of two with the same, the last is
  the one that a sample came of: killed in between, a run asks again.
  """

  def __init__(self, folder: Path):
    self._folder, self._file = folder, (folder / PART).open("a+b")
    self._places: dict[SampleKey, tuple[int, int]] = {}
    self._end = 0
    self._file.seek(0)
    for line in self._file:
      if not line.endswith(b"\n"):
        self._file.truncate(self._end)
        break
      self._place(line)

  def _place(self, line: bytes) -> None:
    if not (found := PREFIX.match(line)):
      raise InputError(
        f"{self._folder / PART} is damaged at byte {self._end}; choose another --workdir"
      )
    self._places[int(found[1]), int(found[2])] = self._end, len(line)
    self._end += len(line)

  def check(self, have: Iterable[SampleKey]) -> None:
    """Refuses a folder in which the answer of a sample is missing."""
    if lost := [w for w in have if w not in self._places]:
      raise InputError(
        f"{self._folder} has {len(lost)} samples whose answers are not in {PART}; bring the file "
        "back or choose another --workdir"
      )

  def add(self, answers: list[dict[str, Any]]) -> None:
    """Returns when all is on disk."""
    lines = [json.dumps(answer).encode() + b"\n" for answer in answers]
    self._file.write(b"".join(lines))
    self._file.flush()
    os.fsync(self._file.fileno())
    for line in lines:
      self._place(line)

  def publish(self, order: Iterable[SampleKey]) -> None:
    """Writes responses.jsonl, whole or not at all."""
    part = self._folder / f".{RESPONSES}.part"
    with part.open("wb") as f:
      for at, size in (self._places[w] for w in order):
        self._file.seek(at)
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
