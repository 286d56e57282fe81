"""Requests for the log-probabilities of given tokens, and their responses.

Texts are sent as token ids, so that no server tokenizes them again. There are three methods:

  PROMPT_LOGPROBS  completions of vLLM with `prompt_logprobs`: at each token, the k most probable
                   tokens and the token itself. About 70 bytes per entry.
  TOKEN_IDS        /inference/v1/generate of vLLM with `prompt_logprob_token_ids`: at each token
                   from the first one on, the log-probability of that token alone. 6 bytes.
  SGLANG           /generate of SGLang with `logprob_start_len`: as PROMPT_LOGPROBS, from the first
                   token on. About 30 bytes per entry.

The responses are not streamed, because no server streams these fields. The temperature is 1, at
which log-probabilities are those of the model's own distribution.
"""

from __future__ import annotations

import base64
import io
import itertools
from typing import Any, NamedTuple

import numpy as np

from distill_jax.errors import InputError
from distill_jax.records import import_logprobs
from distill_jax.records.import_logprobs import Document
from distill_jax.types import JsonObject

PROMPT_LOGPROBS, TOKEN_IDS, SGLANG = "prompt_logprobs", "token_ids", "sglang"
ZERO = -9999.0  # log-probability that vLLM gives in place of -inf, which JSON lacks
CHECK = "Check the server"


class Text(NamedTuple):
  """A text to score.

  Attributes:
    tokens: The token ids of the text, up to the last token that is scored.
    first: The index of the first token that is scored, at least 1.
  """

  tokens: list[int]
  first: int


def request(method: str, model: str, text: Text, k: int) -> tuple[str, JsonObject]:
  """Returns the path and the JSON body of the request that scores a text.

  Args:
    method: PROMPT_LOGPROBS, TOKEN_IDS or SGLANG.
    model: The model's name on the server.
    text: The text.
    k: Number of the most probable tokens; 0 for the tokens of the text alone, as for TOKEN_IDS.
  """
  tokens, first = text
  if method == TOKEN_IDS:
    chosen = {
      "prompt_logprob_token_ids": [[token] for token in tokens[first:]],
      "prompt_logprob_start": first - 1,
      "max_tokens": 1,
      "temperature": 1.0,
    }
    body = {"model": model, "token_ids": tokens, "sampling_params": chosen, "stream": False}
    return "/inference/v1/generate", body
  if method == SGLANG:
    return _sglang(model, {"input_ids": tokens}, first - 1, k)
  return _vllm(model, tokens, k)


def request_of_text(method: str, model: str, text: str) -> tuple[str, JsonObject]:
  """Returns the path and the JSON body of a request with a text that the server tokenizes."""
  if method == SGLANG:
    return _sglang(model, {"text": text}, 0, 0)
  return _vllm(model, text, 0)


def parse(method: str, answer: Any, text: Text, vocab_size: int) -> Document:
  """Returns the scored tokens of a text, each with the log-probabilities of candidates.

  Args:
    method: See `request`.
    answer: The JSON of the response.
    text: The text.
    vocab_size: Number of tokens of the vocabulary.

  Returns:
    The tokens text.first and after; each is among its candidates.

  Raises:
    KeyError, IndexError, TypeError, AttributeError, ValueError: The response is malformed.
    InputError: The server has another vocabulary, or gives a number that cannot be used.
  """
  tokens, first = text
  if method == TOKEN_IDS:
    scores_S1 = _npy(answer["prompt_token_id_logprobs"])
    if scores_S1.shape != (len(tokens) - first, 1):
      raise ValueError(f"There are scores of shape {scores_S1.shape}, not {len(tokens) - first}.")
    scores = scores_S1[:, 0].tolist()
    document: Document = [(t, {t: x}) for t, x in zip(tokens[first:], scores, strict=True)]
  elif method == SGLANG:
    document = _sglang_document(answer["meta_info"], text, vocab_size)
  else:
    document = _vllm_document(_choice(answer), text)
  document = [(token, _with_probability(token, top or {})) for token, top in document]
  import_logprobs.check_values(document, vocab_size, "A response of the server", CHECK)
  return document


def tokens_of(method: str, answer: Any) -> list[int]:
  """Returns the tokens of the text of a response to `request_of_text`.

  Raises:
    KeyError, IndexError, TypeError, AttributeError, ValueError: The response lacks them.
  """
  if method == SGLANG:
    return [int(token) for _, token, *_ in answer["meta_info"]["input_token_logprobs"]]
  return [token for token, _ in import_logprobs.vllm(_choice(answer))]


def first_difference(sent: list[int], read: list[int], vocab_size: int) -> int | None:
  """Returns the first index at which a server reads another token than was sent, or None.

  Args:
    sent: The tokens that were sent.
    read: The tokens that the server returns.
    vocab_size: Number of tokens of SGLang, which returns 0 for the last one; -1 for other servers.
  """
  pairs = itertools.zip_longest(sent, read)
  same = (a == b or (a, b) == (vocab_size - 1, 0) for a, b in pairs)
  return next((i for i, is_same in enumerate(same) if not is_same), None)


def _vllm(model: str, prompt: str | list[int], k: int) -> tuple[str, JsonObject]:
  body = {
    "model": model,
    "prompt": prompt,
    "prompt_logprobs": k,
    "max_tokens": 1,  # the minimum
    "temperature": 1.0,
    "return_token_ids": True,
    "add_special_tokens": False,
    "stream": False,
  }
  return "completions", body


def _sglang(model: str, prompt: JsonObject, start: int, k: int) -> tuple[str, JsonObject]:
  body = prompt | {
    "model": model,
    "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
    "return_logprob": True,
    "logprob_start_len": start,
    "top_logprobs_num": max(k, 1),
    "stream": False,
  }
  return "/generate", body


def _choice(answer: JsonObject) -> JsonObject:
  """Returns the `choices[0]` of a response of vLLM.

  Raises:
    InputError: It has no log-probabilities, as of servers that ignore the field.
  """
  choice = answer["choices"][0]
  if not choice.get("prompt_logprobs"):
    raise InputError(
      "The server does not give the log-probabilities of a prompt. Use vLLM or SGLang, which do."
    )
  return choice


def _vllm_document(choice: JsonObject, text: Text) -> Document:
  """Returns the scored tokens of a text from the `choices[0]` of a response of vLLM."""
  if not choice.get("prompt_token_ids"):  # versions before 0.10.2 do not return them
    choice = choice | {"prompt_token_ids": text.tokens}
  scored = [None] * text.first + choice["prompt_logprobs"][text.first :]
  document = import_logprobs.vllm(choice | {"prompt_logprobs": scored})
  _check_same(text.tokens, [token for token, _ in document])
  return document[text.first :]


def _sglang_document(info: JsonObject, text: Text, vocab_size: int) -> Document:
  """Returns the scored tokens of a text from the `meta_info` of a response of SGLang."""
  tokens, first = text
  own, tops = info["input_token_logprobs"], info["input_top_logprobs"]
  start = len(tokens) - len(own)
  if not 0 <= start < first or len(own) != len(tops):
    raise ValueError(f"There are {len(own)} and {len(tops)} entries for {len(tokens)} tokens.")
  _check_same(tokens[start:], [int(token) for _, token, *_ in own], vocab_size)
  document: Document = []
  scored = zip(tokens[first:], own[first - start :], tops[first - start :], strict=True)
  for token, (logp, *_), top in scored:
    document.append((token, {int(k): float(x) for x, k, *_ in top} | {token: float(logp)}))
  return document


def _check_same(sent: list[int], read: list[int], vocab_size: int = -1) -> None:
  """Checks that a server has read the tokens that were sent to it.

  Raises:
    ValueError: Their number differs.
    InputError: A token differs.
  """
  if len(sent) != len(read):
    raise ValueError(f"There are {len(read)} tokens, not {len(sent)}.")
  if (i := first_difference(sent, read, vocab_size)) is not None:
    raise InputError(
      f"The server reads the token {sent[i]} of a text as {read[i]}. Use a server that does not "
      "change token ids."
    )


def _with_probability(token: int, top: dict[int, float]) -> dict[int, float]:
  """Returns the candidates that have a probability; the token itself must be one of them."""
  if token not in top:
    raise ValueError(f"The log-probability of the text's token {token} is missing.")
  if top[token] <= ZERO:
    raise InputError(
      f"The server gives the token {token} of a text no probability at all. Use a teacher whose "
      "vocabulary has it."
    )
  return {t: x for t, x in top.items() if not x <= ZERO}


def _npy(text: str) -> np.ndarray:
  """Returns the array of a .npy file in base64."""
  raw = io.BytesIO(base64.b64decode(text, validate=True))
  return np.lib.format.read_array(raw, allow_pickle=False)
