"""Sampling from a teacher on a server, with all kinds of faults."""

import asyncio
import collections
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import bad_server
import numpy as np
import pytest
import tiny
from bad_server import KEY, Server

from distill_jax import config
from distill_jax.commands import generate
from distill_jax.commands.record import run as record
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.errors import InputError
from distill_jax.generation import http_client, openai_api
from distill_jax.generation.http_client import Client, RequestFailed, RequestRefused
from distill_jax.generation.job import GenerationJob
from distill_jax.generation.options import ServerOptions
from distill_jax.records.store import open_store

ROOT = Path(__file__).parents[2]
FAULTS = (
  "429 0.1",
  "429 date",
  "429",
  "500",
  "503",
  "close",
  "cut",
  "truncated",
  "silent",
  "drip",
  "half",
  "abort",
  "no choices",
)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
  monkeypatch.setattr(http_client, "FIRST_WAIT_S", 0.02)


def made(folder: Path, server: Server, prompts, /, **changes):
  c = tiny.tiny(folder)
  c.teacher.source = ""
  path = folder / "prompts.jsonl"
  lines = (p if isinstance(p, dict) else {"prompt": p, "answer": 7} for p in prompts)
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  c.generate.prompts = str(path)
  c.generate.server.url = server.url
  c.generate.server.timeout_s = 20.0  # longer than any response takes on a busy machine
  c.generate.server.retries = 3
  for name, value in changes.items():
    section = c.generate if hasattr(c.generate, name) else c.generate.server
    setattr(section, name, value)
  return c


def run(c, folder: Path):
  folder.mkdir(exist_ok=True)
  return generate.run(config.resolve(c), folder)


def lines(path: Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def times_asked(server: Server) -> collections.Counter:
  return collections.Counter((prompt, seed) for _, prompt, seed in server.asked)


def test_faults_do_not_change_the_samples(tmp_path):
  prompts = [f"goes wrong by {fault}" for fault in FAULTS]
  with Server() as calm, Server() as wild:
    for prompt, fault in zip(prompts, FAULTS, strict=True):
      wild.faults[prompt] = [fault]
    want = run(made(tmp_path, calm, prompts, samples=2), tmp_path / "calm")
    c = made(tmp_path, wild, prompts, samples=2, timeout_s=2.0)
    got = run(c, tmp_path / "wild")
  names = ("samples.jsonl", "samples.rejected.jsonl")
  one, two = ([(tmp_path / f / n).read_bytes() for n in names] for f in ("calm", "wild"))
  assert one == two and want["retried"] == 0 and got["retried"] >= len(FAULTS)
  assert not any(wild.faults.values()) and set(wild.answered.values()) == {1}
  rows = lines(tmp_path / "wild" / "samples.jsonl")
  assert [(r["id"], r["sample"]) for r in rows] == [(p, s) for p in range(13) for s in range(2)]
  assert len({r["text"] for r in rows}) == 26  # each sample has a different seed
  assert rows[2]["prompt"] == prompts[1] and rows[2]["about"] == {"answer": 7}
  assert rows[0]["reason"] == "eos" and rows[0]["token_count"] == 7
  assert not {"tokens", "logprob", "logprob_mean"} & set(rows[0])  # not in the responses
  assert got["samples"] == 26 and got["eos"] == 26 and got["tokens"] == 26 * 7
  assert not list((tmp_path / "wild").glob("*part*"))
  n = len(wild.asked)
  assert run(made(tmp_path, wild, prompts, samples=2), tmp_path / "wild")["samples"] == 26
  assert len(wild.asked) == n  # the server has stopped and is not needed


@pytest.mark.parametrize("after, least", [("0.4", 0.4), ("date", 1.0)])
def test_retry_after_is_respected(tmp_path, after, least):
  """Meanwhile there is no other request: with one in flight, the next one is the retry."""
  prompts = ["first", "second"]
  with Server() as server:
    server.faults["first"] = [f"429 {after}"]
    run(made(tmp_path, server, prompts, in_flight=1), tmp_path / "w")
  (t0, *_), (t1, again, _), _ = server.asked
  assert again == "first" and t1 - t0 >= least - 0.01  # a date has whole seconds, here 1 to 2


def test_a_very_long_retry_after_stops_the_run(tmp_path):
  with Server() as server:
    server.faults["a"] = ["429 86400"]
    with pytest.raises(InputError, match=r"asks to wait 86400 s\. Finished samples are kept"):
      run(made(tmp_path, server, ["a"]), tmp_path / "w")


@pytest.mark.parametrize("n", [3, 12])
def test_in_flight_is_the_number_of_concurrent_requests(tmp_path, n):
  """The server answers only when `n` requests are waiting."""
  with Server() as server:
    server.together = threading.Barrier(n)
    run(made(tmp_path, server, [f"p{i}" for i in range(12)], in_flight=n), tmp_path / "w")
  assert server.most == n and len(server.asked) == 12


def test_requests_per_minute_are_limited(tmp_path):
  with Server() as server:
    c = made(tmp_path, server, [f"p{i}" for i in range(12)], requests_per_minute=1200.0)
    start = time.monotonic()
    run(c, tmp_path / "w")
  assert max(at for at, *_ in server.asked) - start >= 12 / 20  # one for the model, 12 samples


@pytest.mark.parametrize("others", [1, 0])
def test_a_busy_server_that_answers_others_is_not_a_failure(monkeypatch, others):
  """A request is rejected five times as busy, although only three retries are allowed."""
  asking, times = Client(ServerOptions(url="http://a/v1", retries=3), 0), 0

  async def once(path, body):
    nonlocal times
    times += 1
    asking.answered += others  # other requests that were answered since the last attempt
    if times <= 5:
      raise RequestFailed("is busy", busy=True)
    return "at last"

  monkeypatch.setattr(asking, "_send", once)
  ask = asking.request("completions", {}, "unlucky", lambda answer: answer)
  if others:
    assert asyncio.run(ask) == "at last" and times == 6 and asking.retried == 5
  else:
    with pytest.raises(RequestFailed, match="is busy, 4 times in a row"):
      asyncio.run(ask)
    assert times == 4


@pytest.mark.parametrize("fault", ["silent", "500", "close"])
def test_a_server_that_never_answers_stops_the_run_and_samples_are_kept(tmp_path, fault):
  prompts = [f"p{i}" for i in range(8)]
  with Server() as server:
    server.faults["p5"], server.forever = [fault], True
    c = made(tmp_path, server, prompts, in_flight=1, retries=1)
    if fault == "silent":
      c.generate.server.timeout_s = 0.5
    with pytest.raises(InputError) as error:
      run(c, tmp_path / "w")
    message = str(error.value)
    assert f"The server at {server.url}" in message and "2 times in a row" in message
    assert f"5 samples are kept in {tmp_path / 'w'} and 3 are missing" in message
    server.faults.clear()
    server.model = "small"
    with pytest.raises(InputError, match="samples from the model big, but the server has small"):
      run(c, tmp_path / "w")
    server.model, c.generate.server.timeout_s = "big", 20.0
    result = run(c, tmp_path / "w")
  assert result["samples"] == 8 and set(server.answered.values()) == {1}
  asked = times_asked(server)
  assert sorted(asked.values()) == [1] * 7 + [3]


def test_an_unreachable_server_is_an_error(tmp_path):
  with Server() as server:
    pass
  with pytest.raises(InputError, match=r"cannot be reached.*\. 0 samples are kept .* 2 are missi"):
    run(made(tmp_path, server, ["a", "b"], retries=1), tmp_path / "w")


def test_refused_requests_stop_the_run_or_are_skipped(tmp_path):
  prompts = ["fine", "far too long", "filtered", "poison", "good"]
  with Server() as server:
    server.forever = True
    server.faults |= {"far too long": ["400"], "filtered": ["filter"], "poison": ["500"]}
    with pytest.raises(InputError, match=r"Sample 0 of prompt 1: .*400.*maximum context.*skip"):
      run(made(tmp_path, server, prompts, in_flight=1), tmp_path / "stop")
    assert times_asked(server).total() == 2  # refused requests are not retried
    c = made(tmp_path, server, prompts, in_flight=2, retries=1, on_bad="skip", samples=4)
    result = run(c, tmp_path / "skip")
  assert result["prompts"] == 5 and result["samples"] == 8 and result["rejected"] == 12
  rejected = lines(tmp_path / "skip" / "samples.rejected.jsonl")
  why = {r["id"]: r["reason"] for r in rejected}
  assert "maximum context" in why[1] and "'content_filter'" in why[2] and "500" in why[3]
  assert {r["id"] for r in lines(tmp_path / "skip" / "samples.jsonl")} == {0, 4}


def test_a_server_that_refuses_all_requests_stops_the_run(tmp_path):
  prompts = [f"p{i}" for i in range(300)]
  with Server() as server:
    server.forever = True
    server.faults |= {p: ["422"] for p in prompts}
    with pytest.raises(InputError, match="Correct the prompt or the config"):
      run(made(tmp_path, server, prompts, on_bad="skip"), tmp_path / "w")
    assert len(server.asked) < 200
    with pytest.raises(InputError, match=r"rejected all requests\. The last reason: .*422"):
      run(made(tmp_path, server, prompts[:3], on_bad="skip"), tmp_path / "few")


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"url": "localhost:8000"}, "server.url is invalid; expected an address"),
    ({"url": "http://me:secret@host/v1"}, "server.url is invalid; expected an address"),
    ({"url": "http://[::1/v1"}, "server.url is invalid; expected an address"),
    ({"in_flight": 0}, "in_flight is 0"),
    ({"timeout_s": 0.0}, "timeout_s is 0.0"),
    ({"repetition": 40}, "repetition is 40; expected 0 for a model on a server"),
    ({"records_dir": "r"}, "records_dir is 'r'; expected '' for a teacher on a server"),
    ({"temperature": -1.0}, "temperature is -1"),
    ({"on_bad": "perhaps"}, "on_bad is 'perhaps'"),
    ({"prompts": "nowhere.jsonl"}, "expected an existing file"),
    ({"field": "question"}, "no field 'question'"),
    ({"api_key_env": "NO_SUCH_VARIABLE"}, "NO_SUCH_VARIABLE'; expected an environment variable"),
  ],
)
def test_an_invalid_config_is_an_error_before_any_request(tmp_path, changes, message):
  with Server() as server, pytest.raises(InputError, match=message) as error:
    run(made(tmp_path, server, ["a"], **changes), tmp_path / "w")
  assert "secret" not in str(error.value) and not server.asked


def test_unusable_prompts_stop_the_run_or_are_skipped(tmp_path):
  prompts = ["good", "", {"prompt": [{"content": "no role"}]}, {"prompt": 3}]
  with Server() as server:
    with pytest.raises(InputError, match="line 2: .*expected a text, or messages"):
      run(made(tmp_path, server, prompts), tmp_path / "stop")
    result = run(made(tmp_path, server, prompts, on_bad="skip"), tmp_path / "skip")
  assert (result["prompts"], result["rejected"], result["samples"]) == (1, 3, 1)


def test_the_model_must_be_named_if_the_server_does_not_list_one(tmp_path):
  with Server(owner="") as server:  # it does not list its models
    with pytest.raises(InputError, match=r"server.model is ''; .*404.*\. Name the model"):
      run(made(tmp_path, server, ["a"]), tmp_path / "w")
    assert run(made(tmp_path, server, ["a"], model="my"), tmp_path / "named")["samples"] == 1
    assert server.bodies[0]["model"] == "my"
  two = {"data": [{"id": "a"}, {"id": "b"}]}
  with pytest.raises(InputError, match=r"2 models \(a, b\)"):
    openai_api.ServedModel.from_answer(two, "")


def test_request_bodies(tmp_path):
  chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
  changes = {"stop": ("\n\n",), "top_k": 5, "top_p": 0.9, "max_new_tokens": 9}
  with Server(owner="vllm") as server:
    c = made(tmp_path, server, [{"prompt": chat}, "and text"], chat=True, **changes)
    c.generate.server.extra = {"chat_template_kwargs": {"enable_thinking": False}, "seed": None}
    vllm = openai_api.ServedModel("big", "vllm")
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
  path, body = openai_api.request(job, openai_api.ServedModel("m"), "once upon", 1, 0)
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
  with pytest.raises(RequestRefused, match="tool_calls"):
    read(message={"content": None}, finish_reason="tool_calls")
  bad = {"content": [{"token": "a", "logprob": float("nan"), "top_logprobs": []}]}
  with pytest.raises(ValueError, match="not finite"):
    read(text="a", finish_reason="stop", logprobs=bad)


@pytest.fixture
def job(tmp_path, monkeypatch):
  """Yields a config of 60 prompts for a server with an API key, and a function that runs it."""
  monkeypatch.setenv("TEACHER_KEY", KEY)
  with Server(key=KEY) as server:
    prompts = [f"p{i}" for i in range(60)]
    c = made(tmp_path, server, prompts, in_flight=4, api_key_env="TEACHER_KEY", timeout_s=300.0)
    file = tmp_path / "served.py"
    file.write_text(
      "from ml_collections import ConfigDict\n"
      f"def get_config():\n  return ConfigDict({c.to_dict()!r}, convert_dict=True)\n"
    )

    def start():
      command = [sys.executable, "-m", "distill_jax.cli", "generate", f"--config={file}"]
      command += [f"--workdir={tmp_path / 'w'}", "--json"]
      environ = os.environ | {"JAX_PLATFORMS": "cpu"}
      pipe = subprocess.PIPE
      return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=pipe, stderr=pipe, text=True)

    yield c, server, tmp_path / "w", start


def wait_for(part: Path, rows: int, job) -> None:
  while not part.exists() or part.read_bytes().count(b"\n") <= rows:
    assert job.poll() is None
    time.sleep(0.01)


def test_resuming_after_kill_sigterm_and_errors_without_leaking_the_key(job, monkeypatch, capfd):
  """A run ends by kill -9 with half a line on disk, SIGTERM, a wrong key, and an echoed key."""
  c, server, folder, start = job
  part = folder / "samples.part.jsonl"

  def silent_from(first: int) -> None:
    """Makes the server silent from this prompt on, so that no run finishes by itself."""
    server.faults.clear()
    server.faults |= {f"p{i}": ["silent"] for i in range(first, 60)}

  server.forever = True
  silent_from(20)
  with start() as killed:
    wait_for(part, 20, killed)
    killed.send_signal(signal.SIGKILL)
    outputs = [killed.stderr.read()]
  kept = [(f"p{r['prompt']}", r["text"]) for r in lines(part)[1:]]
  before = times_asked(server)
  with part.open("ab") as f:
    f.write(b'{"prompt": 4, "sam')
  silent_from(40)
  with start() as told:
    wait_for(part, 40, told)
    told.send_signal(signal.SIGTERM)
    outputs += told.communicate(timeout=60)
  between = times_asked(server)
  assert told.returncode == os.EX_TEMPFAIL and "received SIGTERM" in outputs[-1]
  again = [(f"p{r['prompt']}", r["text"]) for r in lines(part)[1:]]
  assert len(kept) == 20 and len(again) == 40 and again[:20] == kept

  server.faults.clear()
  with monkeypatch.context() as other, pytest.raises(InputError, match="TEACHER_KEY") as wrong:
    other.setenv("TEACHER_KEY", "sk-wrong")
    run(c, folder)
  assert server.refused == 1  # a wrong key is not retried
  server.faults["p59"] = ["500"]
  with pytest.raises(InputError, match=r"out of order, Bearer \*\*\*") as failed:
    run(c, folder)
  server.faults.clear()
  assert run(c, folder)["samples"] == 60
  now = times_asked(server)
  seeds = dict(now.keys())
  assert len(seeds) == len(now) == 60  # a prompt has the same seed in every run
  for i, (prompt, text) in enumerate(again):
    one = prompt, seeds[prompt]
    assert now[one] == (before if i < len(kept) else between)[one]
    assert text == f"{prompt} -> {seeds[prompt]} \u00e9"
  outputs += [str(wrong.value), str(failed.value), *capfd.readouterr()]
  assert all(KEY not in s and "sk-wrong" not in s for s in outputs)
  for path in folder.rglob("*"):
    assert path.is_dir() or KEY.encode() not in path.read_bytes()


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
  rows = lines(tmp_path / "w" / "samples.jsonl")
  assert all(r["logprob"] == pytest.approx(3 * np.log(0.25)) for r in rows)
  if vllm:
    assert all(r["tokens"] == tokenizer.encode(r["text"]) for r in rows)
  responses = lines(tmp_path / "w" / "responses.jsonl")
  assert [(r["id"], r["sample"]) for r in responses] == [(r["id"], r["sample"]) for r in rows]

  c.records.kind, c.records.n, c.records.logprobs_format = "topk", 4, "openai"
  c.records.logprobs = str(tmp_path / "w" / "responses.jsonl")
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
