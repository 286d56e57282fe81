"""Requests and responses of servers with OpenAI's API, and the records made from them."""

import json

import bad_server
import numpy as np
import pytest
import tiny
from bad_server import Server
from json_lines import read_lines
from remote_runs import made, run

from distill_jax import config
from distill_jax.commands.record import run as record
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.errors import InputError
from distill_jax.generation import event_stream, openai_api
from distill_jax.generation.http_client import RequestRefused
from distill_jax.generation.job import GenerationJob
from distill_jax.generation.served_model import ServedModel
from distill_jax.records.store import open_store


def test_request_bodies(tmp_path):
  chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
  changes = {"stop": ("\n\n",), "top_k": 5, "top_p": 0.9, "max_new_tokens": 9}
  with Server(owner="vllm") as server:
    c = made(tmp_path, server, [{"prompt": chat}, "and text"], chat=True, **changes)
    c.generate.server.extra = {"chat_template_kwargs": {"enable_thinking": False}, "seed": None}
    vllm = ServedModel("big", "vllm")
    job = GenerationJob.from_config(config.resolve(c))
    path, body = openai_api.request(job, vllm, chat, 0, 0)
    assert path == "chat/completions" and "seed" not in body
    c.generate.server.extra = {}
    run(c, tmp_path / "w")
  a, b = sorted(server.bodies, key=lambda body: len(body["messages"]), reverse=True)
  assert a["messages"] == chat and b["messages"] == [{"role": "user", "content": "and text"}]
  assert a["seed"] != b["seed"] and max(a["seed"], b["seed"]) < 2**31
  want = {
    "model": "big",
    "stop": ["\n\n"],
    "top_k": 5,
    "top_p": 0.9,
    "max_tokens": 9,
    "temperature": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
  }
  assert want.items() <= a.items() and "logprobs" not in a
  job = GenerationJob.from_config(config.resolve(made(tmp_path, server, ["a"])))
  path, body = openai_api.request(job, ServedModel("m"), "once upon", 1, 0)
  assert path == "completions" and body["prompt"] == "once upon"
  assert not {"top_k", "min_p", "repetition_penalty"} & set(body)  # only fields of OpenAI's API


def test_parsing_of_responses():
  def read(stop=(), **choice):
    return openai_api.parse({"choices": [choice]}, stop)[0]

  message = {"content": "\n\n4", "reasoning_content": "2 and 2\n"}
  r1 = "<think>\n2 and 2\n</think>\n\n4"
  assert read(message=message, finish_reason="stop")["text"] == r1
  message = {"content": None, "reasoning": "2 and"}  # vLLM's newer name; cut off in the reasoning
  got = read(message=message, finish_reason="length")
  assert got["text"] == "<think>\n2 and" and got["reason"] == "length"
  assert read(message={"content": None}, finish_reason="stop")["text"] == ""
  for reason, stop, fields in (
    ("eos", (), {}),
    ("stop", ("x",), {}),
    ("eos", ("x",), {"stop_reason": None}),
    ("eos", ("x",), {"matched_stop": 151643}),
    ("stop", ("x",), {"stop_reason": "x"}),
    ("stop", ("x",), {"matched_stop": "x"}),
  ):
    assert read(stop, text="a", finish_reason="stop", **fields)["reason"] == reason
    first = {"text": "a", "finish_reason": None} | dict.fromkeys(fields)
    parts = [first, {"text": "", "finish_reason": "stop"} | fields]
    stream = b"".join(b"data: %s\n\n" % json.dumps({"choices": [x]}).encode() for x in parts)
    assert openai_api.parse(event_stream.parse(stream), stop)[0] == read(
      stop, text="a", finish_reason="stop", **fields
    )
  with pytest.raises(RequestRefused, match="tool_calls"):
    read(message={"content": None}, finish_reason="tool_calls")
  bad = {"content": [{"token": "a", "logprob": float("nan"), "top_logprobs": []}]}
  with pytest.raises(ValueError, match="not finite"):
    read(text="a", finish_reason="stop", logprobs=bad)


LETTERS = "abcdefgh"


def with_logprobs(tokenizer, vllm: bool, chat: bool):
  """Returns a server's answer: three letters, each the second most likely of four."""
  P = [0.5, 0.25, 0.125, 0.0625]

  def spell(letter):
    return f"token_id:{tokenizer.token_id(letter)}" if vllm else letter

  def answer(body):
    prompt = bad_server.text_of(body)
    first = body["seed"] % len(LETTERS)
    content = []
    for t in range(3):
      some = [LETTERS[(first + t + i) % len(LETTERS)] for i in range(4)]
      top = [{"token": spell(x), "logprob": float(np.log(p))} for x, p in zip(some, P, strict=True)]
      content.append({**top[1], "top_logprobs": top})
    text = "".join(LETTERS[(first + t + 1) % len(LETTERS)] for t in range(3))
    logprobs = {
      "tokens": [x["token"] for x in content],
      "token_logprobs": [x["logprob"] for x in content],
      "top_logprobs": [{y["token"]: y["logprob"] for y in x["top_logprobs"]} for x in content],
    }
    inner = {"message": {"content": text}} if chat else {"text": text}
    if chat:
      logprobs = {"content": content}
    choice = {"finish_reason": "length", "logprobs": logprobs, **inner}
    ids = tokenizer.encode(prompt)
    out = {
      "id": "r",
      "choices": [choice],
      "usage": {"prompt_tokens": len(ids), "completion_tokens": 3},
    }
    if vllm:
      choice["token_ids"] = tokenizer.encode(text)
      out["prompt_token_ids"] = ids
    return out

  return answer


@pytest.mark.parametrize("vllm, chat", [(True, True), (False, False)])
def test_log_probabilities_become_records(tmp_path, vllm, chat):
  """`record` stores the probabilities of the server's responses at each position."""
  tokenizer = load_tokenizer(tiny.write_tokenizer(tmp_path / "tokenizer.json"))
  prompts = [f"ask {i}:" for i in range(9)]
  make = with_logprobs(tokenizer, vllm, chat)
  with Server(owner="vllm" if vllm else "sglang", answer=make) as server:
    c = made(tmp_path, server, prompts, top_logprobs=4, samples=2, chat=chat)
    server.faults["ask 3:"] = ["cut", "truncated"]
    result = run(c, tmp_path / "w")
  assert result["length"] == 18 and "logprobs" in server.bodies[0]
  assert server.bodies[0].get("return_token_ids", False) == vllm
  rows = read_lines(tmp_path / "w" / "samples")
  assert all(r["logprob"] == pytest.approx(3 * np.log(0.25)) for r in rows)
  assert all(r["token_count"] == 3 for r in rows)
  responses = read_lines(tmp_path / "w" / "responses")
  assert [(r["id"], r["sample"]) for r in responses] == [(r["id"], r["sample"]) for r in rows]

  c.records.kind, c.records.n, c.records.logprobs_format = "topk", 4, "openai"
  c.records.logprobs = str(tmp_path / "w" / "responses")
  record(config.resolve(c), tmp_path / "records")
  store, seen = open_store(tmp_path / "records"), 0
  texts = iter(rows)
  for i in range(len(store)):
    row = store[i]
    for segment in range(1, row["segments_T"].max() + 1):
      at = np.flatnonzero(row["segments_T"] == segment)
      r = next(texts)
      want = tokenizer.encode(r["prompt"]) + tokenizer.encode(r["text"])
      assert row["tokens_T"][at].tolist() == want
      assert row["mask_T"][at].tolist() == [False] * (len(want) - 4) + [True] * 3 + [False]
      for t in at[-4:-1]:
        label = LETTERS.index(tokenizer.decode([row["tokens_T"][t + 1]]))
        for j, p in enumerate((0.5, 0.25, 0.125, 0.0625)):
          token = tokenizer.token_id(LETTERS[(label + j - 1) % len(LETTERS)])
          logp = row["logp_TK"][t][row["ids_TK"][t] == token]
          assert np.exp(logp).sum() == pytest.approx(p, rel=0.02)
        seen += 1
  assert seen == 3 * 18 and next(texts, None) is None


def test_missing_log_probabilities_and_tokens_are_errors(tmp_path):
  tokenizer = load_tokenizer(tiny.write_tokenizer(tmp_path / "tokenizer.json"))
  with Server() as server:
    with pytest.raises(InputError, match="top_logprobs is 4; expected 0, since the server"):
      run(made(tmp_path, server, ["a"], top_logprobs=4), tmp_path / "none")
    server.make = with_logprobs(tokenizer, False, False)
    c = made(tmp_path, server, ["a"], top_logprobs=4)
    c.data.tokenizer = ""
    with pytest.raises(InputError, match=r"does not return the tokens.* Set data.tokenizer"):
      run(c, tmp_path / "bare")
    right = server.make
    server.make = lambda b: right(b) | {"usage": {"prompt_tokens": 2, "completion_tokens": 3}}
    with pytest.raises(InputError, match=r"reads a prompt as 2 tokens, but .* encodes it as 1"):
      run(made(tmp_path, server, ["a"], top_logprobs=4), tmp_path / "other")
