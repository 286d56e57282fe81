"""Records from a teacher behind a server: JSONL dumps of responses with top log-probabilities.

One response a line, as the server gave it, in one of three formats:

  vllm    `prompt_logprobs`, a list with null first and then {token id: {"logprob": ...}} for
          each prompt token, beside `prompt_token_ids`; either at the top or in `choices[0]`
          (vLLM puts the prompt's own token among the entries, whatever its rank).
  sglang  `meta_info` with `input_token_logprobs` as [logprob, id, text] a token and
          `input_top_logprobs` as a list of those, and the same for `output_`.
  openai  `choices[0].logprobs.content` with `token`, `logprob` and `top_logprobs` a token,
          and, put there by whoever made the dump, `prompt_token_ids`, because the format
          leaves the prompt out. Strings "token_id:123" (vLLM's return_tokens_as_token_ids)
          are ids.

What such a teacher did not give is not made up: entropy is absent, positions without
log-probabilities are masked out, and the mass outside the entries is what the store's
missing_mass convention says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.data import jsonl
from distill_jax.errors import InputError
from distill_jax.records.fields import ARGMAX, IDS, LABEL_LOGP, LOGP, Record
from distill_jax.runtime import json_io
from distill_jax.types import JsonObject

FORMATS = ("vllm", "sglang", "openai")
# Of each token: its id, and the log-probabilities by id of what could stand there, or None.
Document = list[tuple[int, dict[int, float] | None]]
TokenIds = Callable[[str], int | None]


def sequences(
  path: Path,
  fmt: str,
  *,
  n: int,
  seq_len: int,
  vocab_size: int,
  missing_mass: str,
  token_id: TokenIds | None = None,
) -> Iterator[Record]:
  """Reads a dump into sequences for `Writer.write_shard`, kind "topk" with entropy=False.

  Whole documents are packed in order, as many as fit a sequence.

  Args:
    path: of the JSONL file.
    fmt: "vllm", "sglang" or "openai".
    n: entries kept a position, the likeliest; positions may have fewer.
    seq_len: tokens a sequence; a longer document is refused.
    vocab_size: ids are below it.
    missing_mass: the store's convention. Candidates whose string is no single token can be
      left to the tail, so with "renormalise" they are refused.
    token_id: for strings: the id of a token, or None when there is none or several.

  Raises:
    InputError: naming the line.
  """
  if fmt not in FORMATS:
    raise InputError(f"logprobs format is {fmt!r}; it can be one of {FORMATS}")
  row: list[Document] = []
  for number, response in _lines(path):
    at = f"{path}, line {number}"
    try:
      document = _PARSE[fmt](response, _resolver(token_id, missing_mass, at))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as e:
      if isinstance(e, InputError):
        raise
      raise InputError(f"{at} is not a {fmt} response with log-probabilities ({e!r})") from e
    _check(document, vocab_size, seq_len, at)
    if row and sum(map(len, row)) + len(document) > seq_len:
      yield _pack(row, n, seq_len)
      row = []
    row.append(document)
  if not row:
    raise InputError(f"{path} holds no response; an empty dump makes no records")
  yield _pack(row, n, seq_len)


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
  """Yields (its number, what it holds) for each line."""
  try:
    for line in jsonl.read_lines(path):
      yield line.number, json_io.parse(line.text(), line.where, "one response a line")
  except OSError as e:
    raise InputError(f"{path} cannot be read ({e}); give a UTF-8 JSONL file") from e


def _check(document: Document, vocab_size: int, seq_len: int, at: str) -> None:
  if not 2 <= len(document) <= seq_len:
    raise InputError(f"{at} has {len(document)} tokens; a document here has 2 to {seq_len}")
  for i, (token, top) in enumerate(document):
    for t, logp in {token: -1.0, **(top or {})}.items():
      if not 0 <= t < vocab_size:
        raise InputError(
          f"{at} names token {t} and the vocabulary has {vocab_size}; use its tokenizer"
        )
      if not (np.isfinite(logp) and logp <= 1e-3):
        raise InputError(f"{at}, token {i} has log-probability {logp}; it is finite and at most 0")
    if top and (mass := sum(np.exp(list(top.values())))) > 1.01:
      raise InputError(f"{at}, token {i}: the candidates' probabilities add up to {mass:.3f}")


def _pack(documents: list[Document], n: int, seq_len: int) -> Record:
  """Packs documents into a record: the distribution of token t + 1 is the target of position t."""
  tokens, segments, argmax = (np.zeros(seq_len, np.int32) for _ in range(3))
  mask, label_logp = np.zeros(seq_len, bool), np.zeros(seq_len, np.float32)
  ids = np.zeros((seq_len, n), np.int32)
  logp = np.full((seq_len, n), -np.inf, np.float32)
  t = 0
  for segment, document in enumerate(documents, 1):
    for i, (token, top) in enumerate(document):
      tokens[t], segments[t] = token, segment
      if i and top and token in top:  # without the label's, there is no teacher's loss
        best = sorted(top, key=lambda k: (-top[k], k))[:n]
        ids[t - 1, : len(best)] = best
        logp[t - 1, : len(best)] = [min(top[k], 0.0) for k in best]
        argmax[t - 1], label_logp[t - 1], mask[t - 1] = best[0], min(top[token], 0.0), True
      t += 1
  return {
    "tokens_T": tokens,
    "segments_T": segments,
    "mask_T": mask,
    IDS.record: ids,
    LOGP.record: logp,
    ARGMAX.record: argmax,
    LABEL_LOGP.record: label_logp,
  }


def _resolver(token_id: TokenIds | None, missing_mass: str, at: str) -> Callable:
  def resolve(token: str, chosen: bool) -> int | None:
    if token.startswith("token_id:"):
      return int(token.removeprefix("token_id:"))
    if token_id is None:
      raise InputError(f"{at} gives tokens as strings, as {token!r}; give the teacher's tokenizer")
    found = token_id(token)
    if found is None and (chosen or missing_mass != "tail_bucket"):
      raise InputError(
        f"{at}: {token!r} is not one token of the tokenizer; use the teacher's, or ask the server "
        "for token ids" + ("" if chosen else ", or record with missing_mass=tail_bucket")
      )
    return found

  return resolve


def _vllm(response: JsonObject, _: Callable) -> Document:
  holder = response if "prompt_logprobs" in response else response["choices"][0]
  tokens = holder.get("prompt_token_ids") or response["prompt_token_ids"]
  logprobs = holder["prompt_logprobs"]
  if len(tokens) != len(logprobs):
    raise ValueError(f"{len(tokens)} prompt_token_ids and {len(logprobs)} prompt_logprobs")

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
      raise ValueError(f"{len(own)} {side}_token_logprobs and {len(tops)} {side}_top_logprobs")
    for (logp, token, _text), top in zip(own, tops, strict=True):
      entries = {int(k): float(x) for x, k, _text in top} if top else {}
      if logp is not None and entries:
        entries.setdefault(int(token), float(logp))
      document.append((int(token), entries or None))
  return document


def _openai(response: JsonObject, resolve: Callable) -> Document:
  if "prompt_token_ids" not in response:
    raise ValueError("no prompt_token_ids: add them to each line, the format leaves them out")
  document: Document = [(int(t), None) for t in response["prompt_token_ids"]]
  for entry in response["choices"][0]["logprobs"]["content"]:
    token = resolve(entry["token"], True)
    top = {resolve(x["token"], False): float(x["logprob"]) for x in entry["top_logprobs"]}
    top.pop(None, None)
    if top:
      top.setdefault(token, float(entry["logprob"]))
    document.append((token, top or None))
  return document


_PARSE = {"vllm": _vllm, "sglang": _sglang, "openai": _openai}
