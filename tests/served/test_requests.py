"""Requests that score tokens, against the distributions of the stand-in."""

import asyncio
import math

import numpy as np
import pytest
import scoring_server
from scoring_server import Server

from distill_jax.errors import InputError
from distill_jax.generation.http_client import RequestFailed, RequestRefused
from distill_jax.generation.options import ServerOptions
from distill_jax.served.requests import PROMPT_LOGPROBS, SGLANG, TOKEN_IDS, Text
from distill_jax.served.scoring_client import ScoringClient

TEXT = Text([5, 17, 3, 200, 0, 255, 9], 3)
KIND = {PROMPT_LOGPROBS: "vllm", TOKEN_IDS: "vllm", SGLANG: "sglang"}


def scored(server, text=TEXT, k=4, method="", vocab=256, **options):
  """The scored tokens of a text at a server."""

  async def ask():
    asked = ServerOptions(**{"urls": (server.url,), "retries": 2} | options)
    client = ScoringClient(asked, k, vocab, 0)
    async with client.http:
      await client.open()
      return await client.score(text, method)

  return asyncio.run(ask())


def log_probabilities(text=TEXT):
  return [scoring_server.logp(text.tokens[:i]) for i in range(text.first, len(text.tokens))]


@pytest.mark.parametrize("method", [PROMPT_LOGPROBS, TOKEN_IDS, SGLANG])
def test_every_method_gives_the_tokens_log_probabilities(method):
  with Server(KIND[method], has_token_ids=True) as server:
    found = scored(server, method=method)
  assert [token for token, _ in found] == TEXT.tokens[3:]
  for (token, top), want in zip(found, log_probabilities(), strict=True):
    assert math.isclose(top[token], want[token], rel_tol=1e-6)  # float32 in TOKEN_IDS
    if method != TOKEN_IDS:
      assert {*top} == {token, *np.argsort(-want)[:4].tolist()}
      assert all(math.isclose(x, want[i]) for i, x in top.items())


def test_only_the_scored_tokens_are_asked_for():
  with Server("sglang") as server:
    scored(server)
  assert server.bodies[0]["logprob_start_len"] == 2 and server.paths == ["/generate"]
  with Server(has_token_ids=True) as server:
    scored(server, method=TOKEN_IDS)
  chosen = server.bodies[0]["sampling_params"]
  assert chosen["prompt_logprob_token_ids"] == [[200], [0], [255], [9]]
  assert chosen["prompt_logprob_start"] == 2 and server.paths == ["/inference/v1/generate"]


def test_extra_fields_of_requests():
  with Server() as server:
    scored(server, extra={"priority": 3, "add_special_tokens": None})
  body = server.bodies[0]
  assert body["priority"] == 3 and "add_special_tokens" not in body and body["temperature"] == 1


def test_a_vllm_that_does_not_return_the_tokens():
  def drop(answer):
    del answer["choices"][0]["prompt_token_ids"]
    return answer

  with Server(change=drop) as server:
    assert [token for token, _ in scored(server)] == TEXT.tokens[3:]


def test_candidates_without_probability_are_left_out():
  """vLLM writes -inf, e.g. of padded rows of a vocabulary, as -9999."""

  def pad(answer):
    answer["choices"][0]["prompt_logprobs"][-1]["77"] = {"logprob": -9999.0}
    return answer

  with Server(change=pad) as server:
    assert 77 not in scored(server)[-1][1]


@pytest.mark.parametrize(
  "fault, error, message",
  [
    ("short", RequestFailed, "invalid response .*6 prompt_logprobs"),
    ("none", RequestFailed, "log-probability of the text's token 9 is missing"),
    ("no label", RequestFailed, "token 9 is missing"),
    ("other tokens", InputError, "reads the token 5 of a text as 6"),
    ("nan", InputError, "token 3 has log-probability nan; expected a finite number .* Check the"),
    ("positive", InputError, "has log-probability 0.5"),
    ("heavy", InputError, r"probabilities sum to .*; expected at most 1\. Check the server"),
    ("impossible", InputError, "gives the token 9 of a text no probability"),
    ("400", RequestRefused, "maximum context length"),
  ],
)
def test_a_wrong_response_is_never_a_number(fault, error, message):
  with Server() as server:
    server.forever, server.faults[tuple(TEXT.tokens)] = True, [fault]
    with pytest.raises(error, match=message):
      scored(server, retries=0)


def test_a_server_that_ignores_the_field():
  def drop(answer):
    answer["choices"][0]["prompt_logprobs"] = None
    return answer

  message, other = "does not give the log-probabilities of a prompt", Server("other", change=drop)
  with other as server, pytest.raises(InputError, match=message):
    scored(server)


def test_ids_outside_of_the_vocabulary_are_refused():
  with Server() as server, pytest.raises(InputError, match="the vocabulary has 100 tokens"):
    scored(server, Text([1, 2, 3], 1), vocab=100)


@pytest.mark.parametrize("scores", ["AAAA", "", "no base64", None])
def test_a_broken_array_is_an_invalid_response(scores):
  with (
    Server(has_token_ids=True, change=lambda _: {"prompt_token_id_logprobs": scores}) as server,
    pytest.raises(RequestFailed, match="invalid response"),
  ):
    scored(server, method=TOKEN_IDS, retries=0)


@pytest.mark.parametrize("url", ["{}", "{}/v1", "{}/v1/"])
def test_urls_of_sglang(url):
  """SGLang's own API is not under /v1, which a URL may or may not name."""
  with Server("sglang") as server:
    assert len(scored(server, urls=(url.format(server.url.removesuffix("/v1")),))) == 4
