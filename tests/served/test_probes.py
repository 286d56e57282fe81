"""Servers that answer, but would score texts wrongly."""

import asyncio

import numpy as np
import pytest
import tiny
from scoring_server import Server, logp

from distill_jax.data.chat_template import ChatTemplate
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.errors import InputError
from distill_jax.generation.http_client import RequestFailed
from distill_jax.generation.options import ServerOptions
from distill_jax.served import probes
from distill_jax.served.requests import PROMPT_LOGPROBS, SGLANG, TOKEN_IDS, Text
from distill_jax.served.scoring_client import ScoringClient

TEXT = Text([5, 17, 3, 200, 0, 9, 44, 45], 3)
CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return load_tokenizer(tiny.write_tokenizer(tmp_path_factory.mktemp("t") / "tokenizer.json"))


def probed(probe, *servers, k=4):
  """The result of a probe of some servers."""

  async def run():
    urls = tuple(server.url for server in servers)
    client = ScoringClient(ServerOptions(urls=urls, retries=0), k, 256, 0)
    async with client.http:
      await client.open()
      return await probe(client)

  return asyncio.run(run())


def refused(probe, server, message, **options):
  with server, pytest.raises(InputError, match=message):
    probed(probe, server, **options)


async def agree(client):
  await probes.check_agreement(client, TEXT, 0.05)


def test_servers_that_agree():
  with Server() as one, Server(noise=0.001) as two:
    probed(agree, one, two)
    assert (len(one.asked), len(two.asked)) == (2, 2)


def test_servers_with_other_weights():
  message = r"and those of http.* differ by \d.* expected at most .*max_disagreement, 0\.05"
  with Server() as one, Server(seed=1) as two, pytest.raises(InputError, match=message):
    probed(agree, one, two)


def test_a_server_that_does_not_repeat_itself():
  refused(agree, Server(noise=1.0), "in a second request differ by")


def test_a_store_of_another_model():
  first = np.array([logp(TEXT.tokens[:i])[TEXT.tokens[i]] for i in range(3, 8)], np.float16)
  first[1] = np.nan  # a position that is not recorded

  async def same(client):
    await probes.check_agreement(client, TEXT, 0.05, first)

  with Server() as server:
    probed(same, server)
  refused(same, Server(seed=1), "Serve the model of the store")


def test_a_server_that_is_out_may_come_back():
  with Server() as one, Server() as two:
    two.forever, two.faults[tuple(TEXT.tokens)] = True, ["close"]
    probed(agree, one, two)
    one.forever, one.faults[tuple(TEXT.tokens)] = True, ["close"]
    with pytest.raises(RequestFailed, match="closed the connection"):
      probed(agree, one, two)


def test_more_log_probabilities_than_the_server_gives():
  message = r"refuses to give 40 .*max allowed: 20.*Lower records\.n"
  refused(agree, Server(), message, k=40)


@pytest.mark.parametrize("max_len", [33, 0])
def test_texts_of_the_servers_length(max_len):
  with Server(max_len=max_len) as server:
    probed(lambda client: probes.check_length(client, 32), server)


def test_texts_that_are_too_long():
  message = "takes at most 32 tokens; expected at least 33"
  refused(lambda client: probes.check_length(client, 32), Server(max_len=32), message)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_tokenizers(tokenizer, kind):
  check = lambda client: probes.check_tokenizer(client, tokenizer)
  with Server(kind, encode=tokenizer.encode) as server:
    probed(check, server)
  message = r"reads 'It ' as the tokens \[73, 116, 32\], but .*json as"
  refused(check, Server(kind, encode=lambda text: [*text.encode()]), message)


def test_a_bos_that_the_server_puts_first(tokenizer, monkeypatch):
  monkeypatch.setitem(tokenizer.__dict__, "begin", [7])
  with Server(encode=lambda text: [7, *tokenizer.encode(text)]) as server:
    probed(lambda client: probes.check_tokenizer(client, tokenizer), server)


def test_a_smaller_vocabulary(tokenizer, monkeypatch):
  monkeypatch.setattr(probes, "probe_text", lambda *_: ("It", tokenizer.encode("It")))
  message = r"refuses the last token of .*, 255 .*out of vocabulary"
  check = lambda client: probes.check_tokenizer(client, tokenizer)
  refused(check, Server(encode=tokenizer.encode, vocab=250), message)


def test_the_probing_text_fits_the_server(tokenizer):
  text, ids = probes.probe_text(tokenizer, 150)
  assert 100 < len(ids) <= 150 and text.startswith(probes.SENTENCES)
  assert len(probes.probe_text(tokenizer, 10**6)[1]) > 250


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_chat_templates(tokenizer, kind, capsys):
  check = lambda client: probes.check_chat(client, tokenizer, ChatTemplate(CHATML))
  render = lambda text: lambda messages: tokenizer.encode(text.format(messages[0]["content"]))
  with Server(kind, render=render("<user>{}<assistant>")) as server:
    probed(check, server)
  other = Server(kind, render=render("<user>{}<assistant><think>"))
  refused(check, other, "renders a chat as .* Serve the teacher with the chat template")
  with Server(kind) as server:
    probed(check, server)
  assert "renders no chats" in capsys.readouterr().err


def test_how_labels_are_scored():
  method = lambda client: probes.choose_method(client, TEXT, 0.05)
  with Server(has_token_ids=True) as new, Server() as old, Server("sglang") as other:
    assert probed(method, new, k=0) == TOKEN_IDS
    assert probed(method, new, old, k=0) == probed(method, old, k=0) == PROMPT_LOGPROBS
    assert probed(method, other, k=0) == SGLANG
  with Server(has_token_ids=True, noise=1.0) as wrong:
    assert probed(method, wrong, k=0) == PROMPT_LOGPROBS
