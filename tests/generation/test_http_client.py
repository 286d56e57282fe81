"""Requests to a server that fails: retries, waits and limits."""

import asyncio
import collections
import math
import resource
import threading
import time

import pytest
from bad_server import Server
from json_lines import read_lines
from remote_runs import made, run, times_asked

from distill_jax.errors import InputError, Unavailable
from distill_jax.generation import http_client, servers
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
  "stalls",
  "breaks off",
  "engine died",
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
    c = made(tmp_path, wild, prompts, samples=2, silence_s=2.0, first_byte_s=2.0)
    got = run(c, tmp_path / "wild")
  one, two = ((tmp_path / f / "samples/00000.jsonl").read_bytes() for f in ("calm", "wild"))
  assert one == two and want["retried"] == 0 and got["retried"] >= len(FAULTS)
  assert not any(wild.faults.values()) and set(wild.answered.values()) == {1}
  rows = read_lines(tmp_path / "wild" / "samples")
  n = len(FAULTS)
  assert [(r["id"], r["sample"]) for r in rows] == [(p, s) for p in range(n) for s in range(2)]
  assert len({r["text"] for r in rows}) == 2 * n  # each sample has a different seed
  assert rows[2]["prompt"] == prompts[1] and rows[2]["about"] == {"answer": 7}
  assert rows[0]["reason"] == "eos" and rows[0]["token_count"] == 7
  assert not {"tokens", "logprob", "logprob_mean"} & set(rows[0])  # not in the responses
  assert got["samples"] == 2 * n and got["eos"] == 2 * n and got["tokens"] == 2 * n * 7
  assert {path.name for path in (tmp_path / "wild").rglob("*")} == {
    "samples",
    "00000.jsonl",
    "generate.json",
  }
  asked = len(wild.asked)
  assert run(made(tmp_path, wild, prompts, samples=2), tmp_path / "wild")["samples"] == 2 * n
  assert len(wild.asked) == asked  # the server has stopped and is not needed


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
  asking, times = Client(ServerOptions(urls=("http://a/v1",), retries=3), 0), 0

  async def once(server, path, body):
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


@pytest.mark.parametrize("fault", ["silent", "stalls", "500", "close"])
def test_a_server_that_never_answers_stops_the_run_and_samples_are_kept(tmp_path, fault):
  prompts = [f"p{i}" for i in range(8)]
  with Server() as server:
    server.faults["p5"], server.forever = [fault], True
    c = made(tmp_path, server, prompts, in_flight=1, retries=1)
    if fault in ("silent", "stalls"):
      c.generate.server.silence_s = c.generate.server.first_byte_s = 0.5
      c.generate.server.retries = 8  # not used: a timeout is retried once
    with pytest.raises(Unavailable) as error:
      run(c, tmp_path / "w")
    message = str(error.value)
    assert f"The server at {server.url}" in message and "2 times in a row" in message
    assert f"5 of 8 samples are kept in {tmp_path / 'w'}" in message
    server.faults.clear()
    server.model = "small"
    with pytest.raises(InputError, match="samples from the model big, but the server has small"):
      run(c, tmp_path / "w")
    server.model, c.generate.server.silence_s, c.generate.server.first_byte_s = "big", 20.0, 20.0
    result = run(c, tmp_path / "w")
  assert result["samples"] == 8 and set(server.answered.values()) == {1}
  asked = times_asked(server)
  assert sorted(asked.values()) == [1] * 7 + [3]


def test_a_long_response_is_not_a_timeout_as_long_as_it_goes_on(tmp_path):
  """A response of 1 s with a timeout of 0.5 s of silence: it is streamed, and not asked twice."""
  with Server() as server:
    server.faults["a"], server.forever = ["slow"], True
    changes = {"silence_s": 0.5, "first_byte_s": 0.5}
    assert run(made(tmp_path, server, ["a"], **changes), tmp_path / "w")["retried"] == 0
    assert server.bodies[-1]["stream"] and len(server.asked) == 1
    with pytest.raises(Unavailable, match=r"did not finish .* within 0.3 s, 2 times in a row"):
      run(made(tmp_path, server, ["a"], timeout_s=0.3, **changes), tmp_path / "whole")


@pytest.mark.parametrize("streams", [True, False])
def test_a_server_may_ignore_streaming(tmp_path, streams):
  texts = [], []
  for found, kind in zip(texts, (True, streams), strict=True):
    with Server(streams=kind) as server:
      run(made(tmp_path, server, ["a", "b"]), tmp_path / str(len(server.url) + kind))
    found += read_lines(tmp_path / str(len(server.url) + kind) / "samples")
  assert texts[0] == texts[1] != []


def two_servers(monkeypatch, send, **options):
  """Returns a client of the servers "good" and "bad", whose `send(server)` answers requests."""
  urls = ("http://good/v1", "http://bad/v1")
  asking = Client(ServerOptions(urls=urls, **options), 0)
  monkeypatch.setattr(asking, "_send", lambda server, path, body: send(server))
  return asking, *asking.servers.all


def ask(asking: Client, count: int):
  """Makes `count` requests at the same time and returns their responses."""

  async def ask_all():
    requests = (asking.request("completions", {}, str(i), lambda a: a) for i in range(count))
    return await asyncio.gather(*requests)

  return asyncio.run(ask_all())


def test_a_request_that_failed_goes_to_another_server(monkeypatch):
  """The bad server fails so fast that it always has the fewest requests in flight."""

  async def send(server):
    if server is bad:
      raise RequestFailed("closed the connection")
    await asyncio.sleep(0.01)
    return "good"

  asking, good, bad = two_servers(monkeypatch, send, retries=1)
  assert ask(asking, 20) == ["good"] * 20 and bad.is_out
  assert bad.failures == asking.retried == 3  # then it is skipped


def test_a_server_that_is_out_does_not_use_up_the_retries(monkeypatch):
  """Until the good server may be asked again, the bad one is, more often than there are retries."""
  monkeypatch.setattr(http_client, "retry_wait", lambda failures: 0.001)
  monkeypatch.setattr(servers, "retry_wait", lambda failures: 0.001)

  async def send(server):
    if server is bad:
      good.ready = 0.0 if bad.failures == 5 else math.inf
      raise RequestFailed("cannot be reached", unreachable=True)
    return "good"

  asking, good, bad = two_servers(monkeypatch, send, retries=1)
  good.ready = math.inf
  assert ask(asking, 1) == ["good"] and bad.failures == asking.retried == 6
  good.is_out = True  # no server works: now failures count
  good.ready = math.inf
  with pytest.raises(RequestFailed, match="cannot be reached, 2 times in a row"):
    ask(asking, 1)


def test_requests_go_to_the_servers_with_the_fewest(tmp_path, capfd):
  """One of three servers is down and one dies: both are skipped, and no sample is lost."""
  prompts = [f"p{i}" for i in range(60)]
  with Server() as down:
    pass
  with Server() as good, Server() as dying:
    c = made(tmp_path, good, prompts, in_flight=6)
    c.generate.server.urls = (down.url, good.url, dying.url)
    dying.faults |= {p: ["close"] for p in prompts[20:]}
    dying.forever = True
    result = run(c, tmp_path / "w")
  assert result["samples"] == 60
  served = [{prompt for prompt, _ in s.answered} for s in (good, dying)]
  assert not served[0] & served[1] and len(served[0] | served[1]) == 60
  assert 3 <= len(served[1]) <= 20  # half of the first requests that are in flight
  reported = capfd.readouterr().err
  assert reported.count(f"{down.url} cannot be reached") == 1
  assert "It is skipped for a while." in reported
  assert reported.count(f"{dying.url} cannot be reached or closed the connection") >= 1


def test_a_server_that_comes_back_is_used_again(tmp_path, capfd):
  prompts = [f"p{i}" for i in range(40)]
  with Server() as gone:
    port = gone.server_address[1]
  with Server() as good:
    good.faults, good.forever = {p: ["slow"] for p in prompts}, True
    good.faults = collections.defaultdict(list, good.faults)
    c = made(tmp_path, good, prompts, in_flight=2)
    c.generate.server.urls = (good.url, gone.url)
    timer = threading.Timer(1.0, lambda: revived.append(Server(port=port).__enter__()))
    revived: list[Server] = []
    timer.start()
    assert run(c, tmp_path / "w")["samples"] == 40
  assert len(revived[0].answered) > 5 and f"{gone.url} answers again." in capfd.readouterr().err
  revived[0].__exit__()


def test_servers_of_different_models_are_refused(tmp_path):
  with Server() as one, Server() as two:
    two.model = "small"
    c = made(tmp_path, one, ["a"])
    c.generate.server.urls = (one.url, two.url)
    with pytest.raises(InputError, match=r"serves big .* serves small .*expected the same"):
      run(c, tmp_path / "w")


def test_the_limit_of_open_files_is_raised_if_it_is_needed():
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
  try:
    asyncio.run(Client(ServerOptions(urls=("http://a/v1",), in_flight=1000), 0).__aexit__())
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 1000 + http_client.OTHER_FILES
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
