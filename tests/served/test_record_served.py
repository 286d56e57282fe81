"""`record` with a teacher on servers: what is stored, faults, stops and resumed runs."""

import hashlib
import os
import signal
import threading
import time

import numpy as np
import pytest
import scoring_server
import tiny
from json_lines import write_lines
from scoring_server import Server

from distill_jax import config
from distill_jax.commands import record
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.errors import InputError, Preempted, Unavailable
from distill_jax.records.store import open_store

FAULTS = ("silent", "429 0.1", "500", "close", "cut", "truncated", "engine died", "short", "none")
PROBES = 5  # requests of a run with one server before the first row, 6 with TOKEN_IDS


def made(folder, *urls_of, **changes):
  """A config of a corpus of 20 rows of bytes, for a teacher on servers."""
  c = tiny.tiny(folder)
  c.teacher.source = ""
  lines = [{"text": f"{i} and {i * i}, or {i}?"[: 8 + i % 17]} for i in range(60)]
  c.data.kind, c.data.path = "jsonl", str(write_lines(folder / "text.jsonl", lines))
  c.records.kind, c.records.n, c.records.served = "topk", 5, True
  encode = load_tokenizer(c.data.tokenizer).encode
  for server in urls_of:
    server.encode = server.encode or encode
  c.generate.server.urls = tuple(server.url for server in urls_of)
  c.generate.server.first_byte_s = c.generate.server.silence_s = 20.0
  c.generate.server.retries = 3
  for name, value in changes.items():
    section = c.generate.server if hasattr(c.generate.server, name) else c.records
    setattr(section, name, value)
  return c


def run(c, folder):
  return record.run(config.resolve(c), folder)


def digests(folder):
  return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.array_record")}


def texts(server):
  """The texts of all requests for rows, in order."""
  return [text for _, text, _ in server.asked if text]


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
  """A store that is recorded without faults, the texts of its requests, and the result."""
  folder = tmp_path_factory.mktemp("calm")
  with Server() as server:
    result = run(made(folder, server, in_flight=1), folder / "w")
  return folder / "w", texts(server)[PROBES - 1 :], result


def test_records_are_the_servers_distributions(calm):
  folder, asked, result = calm
  store = open_store(folder)
  assert result["sequences"] == result["recorded_now"] == len(store) == 20
  m = store.manifest
  assert (m.kind, m.n, m.entropy, m.missing_mass) == ("topk", 5, False, "tail_bucket")
  assert m.teacher == {"name": "big", "digest": "unknown: behind a server"}
  documents = 0
  for row in (store[3], store[7]):
    documents += row["segments_T"].max()
    for t in np.flatnonzero(row["mask_T"]):
      start = np.argmax(row["segments_T"] == row["segments_T"][t])
      want = scoring_server.logp(row["tokens_T"][start : t + 1])
      best = np.argsort(-want)[:5]
      assert row["argmax_T"][t] == best[0] and set(row["ids_TK"][t]) == set(best)
      np.testing.assert_allclose(row["logp_TK"][t], want[row["ids_TK"][t]], rtol=1e-3)
      np.testing.assert_allclose(row["label_logp_T"][t], want[row["tokens_T"][t + 1]], rtol=1e-3)
  assert documents > 2  # each document is a text of its own
  assert len(asked) == sum(len(set(store[i]["segments_T"][store[i]["mask_T"]])) for i in range(20))


def test_labels_alone(tmp_path, calm):
  """SGLang and both methods of vLLM give the same labels as a store of the most probable tokens."""
  want = open_store(calm[0])
  for kind, has_token_ids in (("sglang", False), ("vllm", False), ("vllm", True)):
    folder = tmp_path / f"{kind}{has_token_ids}"
    with Server(kind, has_token_ids=has_token_ids) as server:
      run(made(tmp_path, server, kind="labels", n=63), folder)
      path = "/inference/v1/generate" if has_token_ids else server.paths[-1]
      assert {*server.paths[PROBES + 1 :]} == {path}
    store = open_store(folder)
    assert (store.manifest.kind, store.manifest.entropy) == ("labels", False)
    for i in (0, 19):
      np.testing.assert_array_equal(store[i]["mask_T"], want[i]["mask_T"])
      np.testing.assert_array_equal(store[i]["label_logp_T"], want[i]["label_logp_T"])


def test_faults_do_not_change_the_records(tmp_path, calm):
  folder, asked, _ = calm
  with Server() as one, Server() as two:
    for server in (one, two):
      server.faults |= {text: [fault] for text, fault in zip(asked[4:], FAULTS, strict=False)}
    two.faults[asked[4]].clear()  # after two timeouts a request has failed
    c = made(tmp_path, one, two, in_flight=4, first_byte_s=1.0, silence_s=1.0)
    run(c, tmp_path / "w")
  assert digests(tmp_path / "w") == digests(folder)
  assert sum(map(len, one.faults.values())) + sum(map(len, two.faults.values())) <= len(FAULTS)
  assert 2 <= one.most + two.most <= 8 and len(texts(one)) > 5 and len(texts(two)) > 5


def test_a_stopped_run_continues(tmp_path, calm):
  """A server fails for good in the third shard; the next run asks for nothing twice."""
  folder, asked, _ = calm
  with Server() as server:
    server.forever, bad = True, asked[-1]
    server.faults[bad] = ["500"]
    c = made(tmp_path, server, in_flight=2, retries=1)
    with pytest.raises(Unavailable, match=r"responds with 500 .* Finished shards are kept\. Check"):
      run(c, tmp_path / "w")
    assert len(digests(tmp_path / "w")) >= 2
    server.faults.clear()
    before = len(server.asked)
    result = run(c, tmp_path / "w")
    assert 0 < result["recorded_now"] <= 8
    again = texts(server)[before + PROBES - 1 :]
    assert set(again) <= set(asked[-len(again) :])
    count = len(server.asked)
    assert run(c, tmp_path / "w")["recorded_now"] == 0 and len(server.asked) == count
  assert digests(tmp_path / "w") == digests(folder)


def test_a_store_is_not_continued_with_another_model(tmp_path, calm):
  folder, asked, _ = calm
  with Server() as server:
    server.forever, server.faults[asked[-1]] = True, ["500"]
    c = made(tmp_path, server, in_flight=2, retries=0)
    with pytest.raises(Unavailable):
      run(c, tmp_path / "w")
  with Server(seed=1) as other, pytest.raises(InputError, match="those of the store that this run"):
    run(made(tmp_path, other), tmp_path / "w")
  with Server() as renamed:
    renamed.model = "other"
    with pytest.raises(InputError, match=r"teacher\.name='big', but this run has .*'other'"):
      run(made(tmp_path, renamed), tmp_path / "w")


def test_sigterm_while_no_server_answers(tmp_path, calm):
  folder, asked, _ = calm
  with Server() as server:
    server.forever, server.faults[asked[-1]] = True, ["silent"]

    def stop():
      while len(digests(tmp_path / "w")) < 2:
        time.sleep(0.01)
      os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Preempted, match="received SIGTERM; finished shards are kept"):
      run(made(tmp_path, server), tmp_path / "w")
    thread.join()
    server.faults.clear()
    run(made(tmp_path, server), tmp_path / "w")
  assert digests(tmp_path / "w") == digests(folder)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"kind": "sampled"}, r"records\.kind is 'sampled'; expected one of topk, labels"),
    ({"temperature": 2.0}, r"records\.temperature is 2\.0; expected 1\.0 for a teacher on servers"),
    ({"nucleus": 0.9}, r"records\.nucleus is 0\.9"),
    ({"taps": (1,)}, r"records\.taps is \(1,\)"),
    ({"logprobs": "dump"}, r"records\.logprobs is 'dump'"),
    ({"urls": ()}, "urls is empty; expected an address for a teacher on servers"),
    ({"in_flight": 0}, "in_flight is 0"),
    ({"max_disagreement": -1.0}, r"max_disagreement is -1\.0"),
    ({"api_key_env": "NO_SUCH_VARIABLE"}, "NO_SUCH_VARIABLE'; expected an environment variable"),
  ],
)
def test_an_invalid_config_is_an_error_before_any_request(tmp_path, changes, message):
  with Server() as server, pytest.raises(InputError, match=message):
    run(made(tmp_path, server, **changes), tmp_path / "w")
  assert not server.asked


def test_more_log_probabilities_than_the_servers_limit(tmp_path):
  with (
    Server() as server,
    pytest.raises(InputError, match=r"refuses to give 40 .*Lower records\.n"),
  ):
    run(made(tmp_path, server, n=40), tmp_path / "w")
  assert not digests(tmp_path / "w")


def test_tasks_are_refused(tmp_path):
  with Server() as server:
    c = made(tmp_path, server)
    c.tasks.some = config.task("text_classes", classes=("a", "b"))
    with pytest.raises(InputError, match="expected no tasks with records.served"):
      run(c, tmp_path / "w")
