"""Requests to a server that fails: retries, waits and limits."""

import asyncio
import threading
import time

import pytest
from bad_server import Server
from json_lines import read_lines
from remote_runs import made, run, times_asked

from distill_jax.errors import InputError
from distill_jax.generation.http_client import Client, RequestFailed
from distill_jax.generation.options import ServerOptions

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
  rows = read_lines(tmp_path / "wild" / "samples.jsonl")
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
