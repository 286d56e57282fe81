"""Requests that show, before texts are scored, whether servers can score them.

A server that answers is not yet the right teacher: another tokenizer, chat template or vocabulary,
a second server with other weights, or a store that another model began, would all give numbers.
There are 2 requests per server and 4 more, whatever the number of texts.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

import numpy as np

from distill_jax.data.chat_template import ChatTemplate
from distill_jax.data.tokenizers import Tokenizer
from distill_jax.errors import InputError
from distill_jax.generation.http_client import RequestFailed, RequestRefused
from distill_jax.generation.prompts import chat_tokens
from distill_jax.records.import_logprobs import Document
from distill_jax.served import requests
from distill_jax.served.requests import PROMPT_LOGPROBS, TOKEN_IDS, Text
from distill_jax.served.scoring_client import ScoringClient

CHAT = [{"role": "user", "content": "How many days has a year?"}]
SENTENCES = "It costs 1,234.50 EUR.\n\tÜber 中文, naïve Ελληνικά и 'кириллица' — don't  panic! "
PROSE = (  # ordinary text: the rounding of rare tokens' log-probabilities is coarser
  "A year has twelve months. Most of them have thirty or thirty-one days, and one of them has only "
  "twenty-eight, or twenty-nine in every fourth year. So a year has 365 days, or 366."
)
WORDS = 256  # tokens of the vocabulary that the text of `check_tokenizer` is made of, at most


async def check_length(client: ScoringClient, positions: int) -> None:
  """Raises InputError if the servers do not take texts of a row's length and one token more."""
  if 0 < (longest := client.model.max_len) <= positions:
    raise InputError(
      f"{client.http.servers.names} takes at most {longest} tokens; expected at least "
      f"{positions + 1}, for texts of {positions} and one that the server samples. Serve longer "
      "texts (vLLM: --max-model-len; SGLang: --context-length), or record shorter ones."
    )


async def check_agreement(
  client: ScoringClient, text: Text, max_disagreement: float, stored: np.ndarray | None = None
) -> None:
  """Raises InputError if the servers do not give a text the same log-probabilities twice.

  Args:
    client: The client.
    text: The text.
    max_disagreement: See ServerOptions.
    stored: The log-probabilities of its scored tokens in a store that this run continues, or NaN;
      None for a new store.

  Raises:
    InputError: The servers disagree, or refuse to score texts.
    RequestFailed: No server answers.
  """
  servers = client.http.servers.all
  retries = None if len(servers) == 1 else 2  # a server that is out may come back later
  asked = [server for server in servers for _ in range(2)]
  answers = await asyncio.gather(
    *(client.score(text, server=server, retries=retries) for server in asked),
    return_exceptions=True,
  )
  found = {}
  for i, answer in enumerate(answers):
    if isinstance(answer, RequestRefused):
      raise _refused(client, client.k, answer) from answer
    if isinstance(answer, BaseException) and not isinstance(answer, RequestFailed):
      raise answer
    if not isinstance(answer, BaseException):
      found[i] = labels(answer)
  if not found:
    raise next(e for e in answers if isinstance(e, BaseException))
  (one, reference), *others = found.items()
  for i, logps in others:
    if (apart := _mean_difference(reference, logps)) > max_disagreement:
      same = asked[i] is asked[one]
      second = "in a second request" if same else f"and those of {asked[i].url}"
      raise InputError(
        f"The log-probabilities of {asked[one].url} {second} differ by {apart:.3g} nats per token; "
        f"expected at most generate.server.max_disagreement, {max_disagreement:g}. Serve one model "
        "with one dtype, or raise the limit."
      )
  if stored is not None and (apart := _mean_difference(stored, reference)) > max_disagreement:
    raise InputError(
      f"The log-probabilities of {client.http.servers.names} and those of the store that this run "
      f"continues differ by {apart:.3g} nats per token; expected at most "
      f"generate.server.max_disagreement, {max_disagreement:g}. Serve the model of the store, or "
      "record into another folder."
    )


async def choose_method(client: ScoringClient, text: Text, max_disagreement: float) -> str:
  """Returns TOKEN_IDS if all servers support it and give the same numbers; else `client.method`.

  Args:
    client: The client, which asks for the text's own tokens alone.
    text: The text.
    max_disagreement: See ServerOptions.
  """
  if client.method != PROMPT_LOGPROBS:
    return client.method
  reference = labels(await client.score(text))
  for server in client.http.servers.all:
    try:
      logps = labels(await client.score(text, TOKEN_IDS, server, retries=0))
    except (RequestFailed, RequestRefused, InputError):  # an older version, or a proxy
      return client.method
    if _mean_difference(reference, logps) > max_disagreement:
      return client.method
  return TOKEN_IDS


async def check_tokenizer(client: ScoringClient, tokenizer: Tokenizer) -> None:
  """Raises InputError if the servers have another tokenizer or vocabulary."""
  longest = client.model.max_len or sys.maxsize
  text, ours = probe_text(tokenizer, longest - 1)
  try:
    theirs = await client.tokens(text)
  except RequestRefused as e:
    raise _refused(client, 0, e) from e
  begin = tokenizer.begin
  if begin and theirs[: len(begin)] == begin and ours[: len(begin)] != begin:
    theirs = theirs[len(begin) :]
  if (i := requests.first_difference(ours, theirs, tokenizer.vocab_size)) is not None:
    raise InputError(
      f"{client.http.servers.names} reads {tokenizer.decode(ours[i : i + 3])!r} as the tokens "
      f"{theirs[i : i + 3]}, but {tokenizer.where} as {ours[i : i + 3]}. Serve a teacher with the "
      "tokenizer of the texts."
    )
  special = set(tokenizer.special_tokens)
  last = next(
    i for i in reversed(range(tokenizer.vocab_size)) if tokenizer.piece(i) not in (None, *special)
  )
  try:
    await client.score(Text([*ours[:8], last], len(ours[:8])), k=0)
  except RequestRefused as e:
    raise InputError(
      f"{client.http.servers.names} refuses the last token of {tokenizer.where}, {last} "
      f"({str(e).rstrip('.')}). Serve a teacher with the vocabulary of the texts."
    ) from e


async def check_chat(client: ScoringClient, tokenizer: Tokenizer, template: ChatTemplate) -> None:
  """Raises InputError if the servers render a chat otherwise than the template of the texts."""
  ours = chat_tokens(tokenizer, template, CHAT)
  try:
    count, theirs = await client.chat(CHAT)
  except (RequestRefused, InputError) as e:
    print(
      f"{client.http.servers.names} renders no chats ({str(e).rstrip('.')}). Its chat template is "
      "not compared.",
      file=sys.stderr,
    )
    return
  if theirs != ours if theirs is not None else count != len(ours):
    shown = theirs if theirs is not None else f"{count} tokens"
    raise InputError(
      f"{client.http.servers.names} renders a chat as {shown}, but the chat template of the texts "
      f"as {ours}. Serve the teacher with the chat template of the texts (vLLM and SGLang: "
      "--chat-template)."
    )


def probe_text(tokenizer: Tokenizer, longest: int) -> tuple[str, list[int]]:
  """Returns a text of tokens from the whole vocabulary, and its tokens, at most `longest`."""
  size = tokenizer.vocab_size
  pieces = [tokenizer.decode([i]) for i in range(0, size, -(-size // WORDS))]
  special = set(tokenizer.special_tokens)
  words = [p for p in pieces if p.strip() and p.isprintable() and p not in special]
  words = [p for p in words if "\ufffd" not in p]
  while True:
    text = SENTENCES + " ".join(words)
    ids = tokenizer.encode(text)
    if len(ids) <= longest or not words:
      return text, ids
    words = words[: len(words) // 2]


def labels(document: Document) -> np.ndarray:
  """Returns the log-probabilities of the tokens of a scored text, in order."""
  return np.array([top[token] for token, top in document if top])


def _mean_difference(a: Sequence[float] | np.ndarray, b: np.ndarray) -> float:
  """Returns the mean absolute difference, without positions at which `a` is NaN."""
  return float(np.nanmean(np.abs(np.asarray(a) - b)))


def _refused(client: ScoringClient, k: int, refused: RequestRefused) -> InputError:
  """Returns the error for a server that refuses to give k log-probabilities per token."""
  reason = str(refused).rstrip(".")
  if not k:
    return InputError(
      f"{client.http.servers.names} refuses to score a text ({reason}). Use vLLM or SGLang."
    )
  return InputError(
    f"{client.http.servers.names} refuses to give {k} log-probabilities per token "
    f"({reason}). Lower records.n, or start the servers with a higher limit (vLLM: "
    "--max-logprobs)."
  )
