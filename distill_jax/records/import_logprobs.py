"""Import of records from a served teacher: JSONL dumps of responses with top log-probabilities.

A line is one response of the server, in one of three formats:

  vllm    `prompt_logprobs`, a list of null and then {token id: {"logprob": ...}} for each prompt
          token, and `prompt_token_ids`, both at the top level or in `choices[0]`. vLLM always
          includes the prompt's own token among the entries.
  sglang  `meta_info` with `input_token_logprobs`, a list of [logprob, id, text] per token, and
          `input_top_logprobs`, a list of such lists per token; the same for `output_`.
  openai  `choices[0].logprobs.content` with `token`, `logprob` and `top_logprobs` per token. The
          format lacks the prompt, so `prompt_token_ids` must be added to each line. Strings
          "token_id:123" (vLLM's return_tokens_as_token_ids) are ids.

Missing values stay missing: entropies are not stored, positions without log-probabilities are
masked, and the mass outside the entries follows the convention `missing_mass` of the store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from distill_jax.data import jsonl
from distill_jax.errors import InputError, check_choice
from distill_jax.records.fields import ARGMAX, IDS, LABEL_LOGP, LOGP, Record
from distill_jax.runtime import json_io
from distill_jax.types import JsonObject

FORMATS = ("vllm", "sglang", "openai")
# The id of each token, and the log-probabilities of the candidates at its position by id, or None.
Document = list[tuple[int, dict[int, float] | None]]
TokenIds = Callable[[str], int | None]


def sequences(
  path: str,
  fmt: str,
  *,
  n: int,
  seq_len: int,
  vocab_size: int,
  missing_mass: str,
  token_id: TokenIds | None = None,
) -> Iterator[Record]:
  """Yields the sequences of a dump as records of kind "topk" without entropy.

  Each sequence packs as many whole documents as fit, in order.

  Args:
    path: The path or URL of the JSONL file, or of a folder of them.
    fmt: "vllm", "sglang" or "openai".
    n: Maximum number of entries per position; the most probable ones are kept.
    seq_len: Number of tokens per sequence, and maximum length of a document.
    vocab_size: Number of tokens of the vocabulary.
    missing_mass: Convention of the store. With "tail_bucket", candidates whose string is not a
      single token count towards the tail; with "renormalise" they raise an error.
    token_id: Returns the id of a string that is a single token, otherwise None.

  Raises:
    InputError: A line cannot be used; the message names it.
  """
  check_choice("records.logprobs_format", fmt, FORMATS, "Correct it")
  row: list[Document] = []
  for number, response in _lines(path):
    at = f"{path}, line {number}"
    try:
      document = _PARSE[fmt](response, _resolver(token_id, missing_mass, at))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as e:
      if isinstance(e, InputError):
        raise
      raise InputError(
        f"{at} is not a {fmt} response with log-probabilities ({e!r}). Correct the dump or "
        "records.logprobs_format."
      ) from e
    _check(document, vocab_size, seq_len, at)
    if row and sum(map(len, row)) + len(document) > seq_len:
      yield _pack(row, n, seq_len)
      row = []
    row.append(document)
  if not row:
    raise InputError(f"{path} is empty. Name a dump with responses.")
  yield _pack(row, n, seq_len)


def _lines(path: str) -> Iterator[tuple[int, Any]]:
  """Yields (line number, JSON value) for each line."""
  for line in jsonl.read_lines(*jsonl.find_files(path)):
    yield line.number, json_io.parse(line.text(), line.where, "Write one response per line")


def _check(document: Document, vocab_size: int, seq_len: int, at: str) -> None:
  if not 2 <= len(document) <= seq_len:
    raise InputError(
      f"{at} has {len(document)} tokens; expected 2 to {seq_len}. Remove the line, or raise "
      "data.seq_len."
    )
  check_values(document, vocab_size, at, "Remove the line")


def check_values(document: Document, vocab_size: int, at: str, action: str) -> None:
  """Checks the ids and log-probabilities of a document.

  Args:
    document: The document.
    vocab_size: Number of tokens of the vocabulary.
    at: The place of the document, for messages.
    action: What to do about a wrong number.

  Raises:
    InputError: An id is outside the vocabulary, or a number is not a log-probability.
  """
  for i, (token, top) in enumerate(document):
    for t, logp in {token: -1.0, **(top or {})}.items():
      if not 0 <= t < vocab_size:
        raise InputError(
          f"{at} has the token id {t}, but the vocabulary has {vocab_size} tokens. Use the "
          "teacher's tokenizer."
        )
      if not (math.isfinite(logp) and logp <= 1e-3):
        raise InputError(
          f"{at}, token {i} has log-probability {logp}; expected a finite number of at most 0. "
          f"{action}."
        )
    if top and (mass := sum(map(math.exp, top.values()))) > 1.01:
      raise InputError(
        f"{at}, token {i} has candidates whose probabilities sum to {mass:.3f}; expected at most "
        f"1. {action}."
      )


def _pack(documents: list[Document], n: int, seq_len: int) -> Record:
  """Packs documents into a record. The target of position t is the distribution of token t + 1."""
  tokens, segments = np.zeros(seq_len, np.int32), np.zeros(seq_len, np.int32)
  mask = np.zeros(seq_len, bool)
  targets = {
    IDS.record: np.zeros((seq_len, n), np.int32),
    LOGP.record: np.full((seq_len, n), -np.inf, np.float32),
    ARGMAX.record: np.zeros(seq_len, np.int32),
    LABEL_LOGP.record: np.zeros(seq_len, np.float32),
  }
  t = 0
  for segment, document in enumerate(documents, 1):
    for i, (token, top) in enumerate(document):
      tokens[t], segments[t] = token, segment
      if i and top and token in top:  # skipped if the label's log-probability is missing
        set_targets(targets, t - 1, token, top, n)
        mask[t - 1] = True
      t += 1
  return {"tokens_T": tokens, "segments_T": segments, "mask_T": mask} | targets


def set_targets(targets: Record, t: int, token: int, top: dict[int, float], n: int) -> None:
  """Sets the targets of a position.

  Args:
    targets: The targets of all positions.
    t: The position.
    token: The next token, which is one of the candidates.
    top: The log-probabilities of the candidates, by id.
    n: Maximum number of entries: the most probable candidates, and of equal ones those with the
      smallest ids. 0: the next token's log-probability alone.
  """
  targets[LABEL_LOGP.record][t] = min(top[token], 0.0)
  if n:
    best = sorted(top, key=lambda k: (-top[k], k))[:n]
    targets[IDS.record][t, : len(best)] = best
    targets[LOGP.record][t, : len(best)] = [min(top[k], 0.0) for k in best]
    targets[ARGMAX.record][t] = best[0]


def _resolver(token_id: TokenIds | None, missing_mass: str, at: str) -> Callable:
  def resolve(token: str, chosen: bool) -> int | None:
    if token.startswith("token_id:"):
      return int(token.removeprefix("token_id:"))
    if token_id is None:
      raise InputError(
        f"{at} has tokens as strings, e.g. {token!r}. Set data.tokenizer to the teacher's "
        "tokenizer."
      )
    found = token_id(token)
    if found is None and (chosen or missing_mass != "tail_bucket"):
      raise InputError(
        f"{at} has {token!r}, which is not a single token of the tokenizer. Use the teacher's "
        "tokenizer, or request token ids from the server"
        + ("." if chosen else ", or set records.missing_mass=tail_bucket.")
      )
    return found

  return resolve


def vllm(response: JsonObject, _: Callable | None = None) -> Document:
  """Returns the document of a response of vLLM."""
  holder = response if "prompt_logprobs" in response else response["choices"][0]
  tokens = holder.get("prompt_token_ids") or response["prompt_token_ids"]
  logprobs = holder["prompt_logprobs"]
  if len(tokens) != len(logprobs):
    raise ValueError(f"{len(tokens)} prompt_token_ids, but {len(logprobs)} prompt_logprobs.")

  def value(x: JsonObject | float) -> float:
    return float(x["logprob"] if isinstance(x, dict) else x)

  return [
    (int(t), {int(k): value(x) for k, x in top.items()} if top else None)
    for t, top in zip(tokens, logprobs, strict=True)
  ]


def _sglang(response: JsonObject, _: Callable) -> Document:
  info, document = response["meta_info"], []
  for side in ("input", "output"):
    own = info.get(f"{side}_token_logprobs") or []
    tops = info.get(f"{side}_top_logprobs") or []
    if len(own) != len(tops):
      raise ValueError(f"{len(own)} {side}_token_logprobs, but {len(tops)} {side}_top_logprobs.")
    for (logp, token, _text), top in zip(own, tops, strict=True):
      entries = {int(k): float(x) for x, k, _text in top} if top else {}
      if logp is not None and entries:
        entries.setdefault(int(token), float(logp))
      document.append((int(token), entries or None))
  return document


def _openai(response: JsonObject, resolve: Callable) -> Document:
  if "prompt_token_ids" not in response:
    raise ValueError("prompt_token_ids is missing; add it to each line.")
  document: Document = [(int(t), None) for t in response["prompt_token_ids"]]
  for entry in response["choices"][0]["logprobs"]["content"]:
    token = resolve(entry["token"], True)
    top = {resolve(x["token"], False): float(x["logprob"]) for x in entry["top_logprobs"]}
    top.pop(None, None)
    if top:
      top.setdefault(token, float(entry["logprob"]))
    document.append((token, top or None))
  return document


_PARSE: dict[str, Callable[..., Document]] = {"vllm": vllm, "sglang": _sglang, "openai": _openai}
