"""Sampling from a teacher on a server: what is refused, and runs that are stopped and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bad_server import KEY, Server
from json_lines import read_lines
from remote_runs import made, run, times_asked

from distill_jax.errors import InputError, Unavailable
from distill_jax.generation.served_model import ServedModel

ROOT = Path(__file__).parents[2]


def test_an_unreachable_server_is_an_error(tmp_path):
  with Server() as server:
    pass
  with pytest.raises(Unavailable, match=r"cannot be reached.*\. 0 of 2 samples are kept in"):
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
  rejected = read_lines(tmp_path / "skip" / "samples.rejected")
  why = {r["id"]: r["reason"] for r in rejected}
  assert "maximum context" in why[1] and "'content_filter'" in why[2] and "500" in why[3]
  assert {r["id"] for r in read_lines(tmp_path / "skip" / "samples")} == {0, 4}


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
    ({"urls": ("localhost:8000",)}, "server.urls is invalid; expected addresses"),
    ({"urls": ("http://me:secret@host/v1",)}, "server.urls is invalid"),
    ({"urls": ("http://a/v1", "http://[::1/v1")}, "server.urls is invalid"),
    ({"urls": ("http://a/v1", "http://a/v1/")}, "expected different addresses"),
    ({"in_flight": 0}, "in_flight is 0"),
    ({"silence_s": 0.0}, "silence_s is 0.0"),
    ({"in_flight": 10**9}, "in_flight is 1000000000; expected at most"),
    (
      {"samples": 2, "temperature": 0.0},
      "generate.samples is 2; expected 1 with generate.temperature=0, where all texts of a prompt",
    ),
    ({"repetition": 40}, "repetition is 40; expected 0 for a model on a server"),
    ({"records_dir": "r"}, "records_dir is 'r'; expected '' for a teacher on a server"),
    ({"temperature": -1.0}, "temperature is -1"),
    ({"on_bad": "perhaps"}, "on_bad is 'perhaps'"),
    ({"prompts": "nowhere.jsonl"}, "expected an existing file, or a folder"),
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
    ServedModel.from_answer(two, "")


@pytest.fixture
def job(tmp_path, monkeypatch):
  """Yields a config of 60 prompts for a server with an API key, and a function that runs it."""
  monkeypatch.setenv("TEACHER_KEY", KEY)
  with Server(key=KEY) as server:
    prompts = [f"p{i}" for i in range(60)]
    c = made(tmp_path, server, prompts, in_flight=4, api_key_env="TEACHER_KEY", silence_s=300.0)
    c.generate.server.first_byte_s = 300.0
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


def logged(folder: Path) -> list[tuple[str, str]]:
  """Returns the prompt and text of each sample in the log, in the order of the log."""
  found = []
  for piece in sorted((folder / "samples/.log").glob("*.piece")):
    _, *lines = piece.read_text().splitlines()
    found += [(f"p{row['id']}", row["text"]) for row in map(json.loads, lines)]
  return found


def wait_for(folder: Path, count: int, job) -> None:
  while len(logged(folder)) < count:
    assert job.poll() is None
    time.sleep(0.01)


def test_resuming_after_kill_sigterm_and_errors_without_leaking_the_key(job, monkeypatch, capfd):
  """A run ends by kill -9 while it writes, SIGTERM, a wrong key, and an echoed key."""
  c, server, folder, start = job

  def silent_from(first: int) -> None:
    """Makes the server silent from this prompt on, so that no run finishes by itself."""
    server.faults.clear()
    server.faults |= {f"p{i}": ["silent"] for i in range(first, 60)}

  server.forever = True
  silent_from(20)
  with start() as killed:
    wait_for(folder, 20, killed)
    killed.send_signal(signal.SIGKILL)
    outputs = [killed.stderr.read()]
  kept = logged(folder)
  before = times_asked(server)
  (folder / "samples/.log/.00000099.piece.host.1.part").write_bytes(b'[[4,0,"eos"')
  silent_from(40)
  with start() as told:
    wait_for(folder, 40, told)
    told.send_signal(signal.SIGTERM)
    outputs += told.communicate(timeout=60)
  between = times_asked(server)
  assert told.returncode == os.EX_TEMPFAIL and "received SIGTERM" in outputs[-1]
  again = logged(folder)
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
