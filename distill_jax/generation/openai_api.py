"""The request and response formats of OpenAI-compatible servers."""

from __future__ import annotations

import hashlib
import math
from typing import Any

from distill_jax.data import corpus
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.generation.job import GenerationJob
from distill_jax.generation.prompts import Message, PromptEncoder, model_input
from distill_jax.generation.request_errors import RequestRefused
from distill_jax.generation.served_model import ServedModel
from distill_jax.runtime import json_io
from distill_jax.types import JsonObject

REASONS = {"stop": "eos", "length": "length"}  # finish_reason: reason of a sample
BROKEN_OFF = (None, "abort", "error")  # finish_reason of an incomplete response

TokenLogprobs = list[JsonObject]  # one object per token, in the format of chat completions


def request(
  job: GenerationJob, served: ServedModel, content: str | list[Message], prompt: int, sample: int
) -> tuple[str, JsonObject]:
  """Returns the path and the JSON body of the request for one sample.

  Args:
    job: The job.
    served: The model.
    content: The prompt, as text or messages.
    prompt: The index of the prompt, for the seed.
    sample: The index of the sample, for the seed.
  """
  given, top = model_input(job, content), job.server.top_logprobs
  is_text, sampling = isinstance(given, str), job.sampling
  digest = hashlib.sha256(f"{job.seed}/{prompt}/{sample}".encode()).digest()
  body: JsonObject = {
    "model": served.name,
    "prompt" if is_text else "messages": given,
    "max_tokens": job.max_new_tokens,
    "temperature": sampling.temperature,
    "top_p": sampling.top_p,
    "seed": int.from_bytes(digest[:4], "big") >> 1,  # some servers accept only 31 bits
    "stream": True,  # so that a silent server is noticed; see http_client.py
    "stream_options": {"include_usage": True},
  }
  if job.stop:
    body["stop"] = list(job.stop)
  if job.ignore_eos:
    body["ignore_eos"] = True
  if served.server:  # their defaults come from generation_config.json, so send all settings
    body |= {"top_k": sampling.top_k or -1, "min_p": sampling.min_p, "repetition_penalty": 1.0}
  else:  # other servers may reject fields that OpenAI's API does not have
    body |= {k: v for k, v in (("top_k", sampling.top_k), ("min_p", sampling.min_p)) if v}
  if top:
    body |= {"logprobs": top} if is_text else {"logprobs": True, "top_logprobs": top}
    if served.server == "vllm":
      body |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
  body = {k: v for k, v in (body | job.server.extra).items() if v is not None}
  return "completions" if is_text else "chat/completions", body


def parse(answer: Any, stop: tuple[str, ...]) -> tuple[JsonObject, TokenLogprobs | None]:
  """Parses a response.

  Args:
    answer: The JSON of the response.
    stop: The stop strings of the request.

  Returns:
    The fields of the sample's line, and the log-probabilities of its tokens or None.

  Raises:
    RequestRefused: If a content filter or a tool call ended the text.
    KeyError, IndexError, TypeError, AttributeError, ValueError: If the response is malformed or
      incomplete.
  """
  choice = answer["choices"][0]
  finish = choice.get("finish_reason")
  if finish in BROKEN_OFF:
    raise ValueError(f"The finish_reason is {finish!r}.")
  if finish not in REASONS:
    raise RequestRefused(f"The server ended the text with the finish_reason {finish!r}.")
  text = _text(choice["message"]) if "message" in choice else choice["text"]
  if json_io.lone_surrogate(text):
    raise ValueError("The text contains half a surrogate pair.")
  token_logprobs = _token_logprobs(choice)
  usage = (answer.get("usage") or {}).get("completion_tokens")
  tokens = choice.get("token_ids") or token_logprobs or []
  count = len(tokens) if usage is None else int(usage)
  row = {"text": text, "token_count": count, "reason": REASONS[finish]}
  if finish == "stop" and _is_stop_string(choice, stop):
    row["reason"] = "stop"
  if token_logprobs:
    logps = [float(x["logprob"]) for x in token_logprobs]
    if not all(map(math.isfinite, logps)):
      raise ValueError("A log-probability is not finite.")
    row |= {"logprob": sum(logps), "logprob_mean": sum(logps) / len(logps)}
  return row, token_logprobs


def _text(message: JsonObject) -> str:
  """Returns a message's reasoning and text in DeepSeek-R1's format."""
  reasoning = message.get("reasoning_content") or message.get("reasoning")
  content = message["content"] or ""
  if not reasoning:
    return content
  unclosed = "<think>\n" + reasoning.strip("\n")
  return f"{unclosed}\n</think>\n\n" + content.lstrip("\n") if content else unclosed


def _is_stop_string(choice: JsonObject, stop: tuple[str, ...]) -> bool:
  """Returns True if a stop string ended the text, and False if the model did."""
  for key in ("stop_reason", "matched_stop"):  # fields of vLLM and SGLang
    if key in choice:
      return isinstance(choice[key], str) and choice[key] in stop
  return bool(stop)


def _token_logprobs(choice: JsonObject) -> TokenLogprobs | None:
  """Returns the log-probabilities of each token in the format of chat completions, or None."""
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
  """Determines the tokens of prompts, from the server's response or with a local tokenizer.

  Args:
    job: The job.
  """

  def __init__(self, job: GenerationJob):
    self._job = job
    self._encoder = PromptEncoder(job)
    self._tokenizer: Tokenizer | None = None

  def __call__(self, content: str | list[Message], answer: Any) -> list[int]:
    """Returns the tokens of a prompt.

    Args:
      content: The prompt, as text or messages.
      answer: The JSON of the server's response to the prompt.

    Raises:
      InputError: If neither the response nor a local tokenizer has the tokens, or if their number
        differs between the two.
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
        f"The server reads a prompt as {count} tokens, but {self._tokenizer.where} encodes it as "
        f"{len(ids)}. Use the server's tokenizer and chat template."
      )
    return ids

  def _read_tokenizer(self) -> Tokenizer:
    data = self._job.data
    try:
      pretrained = None if data.tokenizer else self._job.source.pretrained
      return corpus.tokenizer_of(data, pretrained)
    except InputError as e:
      raise InputError(f"The server does not return the tokens of prompts. {e}") from e
