"""`record` with a teacher on servers, by commands: two processes, and one that is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from scoring_server import Server

from distill_jax.commands import record
from distill_jax.config import resolve
from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.records.store import open_store
from distill_jax.served import row_texts

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture
def made(tmp_path):
  """Yields a server, the path of a config for it, and the config."""
  with Server() as server:
    changes = [
      'c.teacher.source = ""',
      'c.records.kind, c.records.n, c.records.served = "topk", 5, True',
      f"c.generate.server.urls = ({server.url!r},)",
      'c.generate.server.model = "big"',
      "c.generate.server.in_flight = 4",
    ]
    file = tiny.write_config(tmp_path / "config.py", tmp_path, *changes)
    scope: dict = {}
    exec(file.read_text(), scope)
    c = scope["get_config"]()
    server.encode = load_tokenizer(c.data.tokenizer).encode
    yield server, file, c


def in_two_processes(file, folder, *flags):
  """Runs `record` with a config in two processes."""
  command = [sys.executable, "launch/local.py", "--processes=2", "--devices=1", "--", "record"]
  command += [f"--config={file}", f"--workdir={folder}", *flags]
  return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def shards(folder):
  return {p.name: p.read_bytes() for p in folder.glob("*.array_record")}


def texts(server):
  """The texts of rows: those of `prompt_logprobs` without the probing ones."""
  rows = [body for body in server.bodies if body.get("prompt_logprobs") and "prompt" in body]
  return [tuple(body["prompt"]) for body in rows if isinstance(body["prompt"], list)]


def test_two_processes_record_the_same_store(made, tmp_path):
  server, file, c = made
  record.run(resolve(c), tmp_path / "one")
  alone = sorted(texts(server))
  server.bodies.clear()
  done = in_two_processes(file, tmp_path / "two")
  assert done.returncode == 0, done.stdout + done.stderr
  assert shards(tmp_path / "one") == shards(tmp_path / "two")
  assert sorted(texts(server)) == alone  # process 0 alone makes the probes
  assert server.most <= 4


def test_an_unreachable_server_stops_both_processes(made, tmp_path):
  server, file, _ = made
  server.shutdown()
  server.server_close()
  done = in_two_processes(file, tmp_path / "two", "--config.generate.server.retries=1")
  assert done.returncode == os.EX_TEMPFAIL and "cannot be reached" in done.stdout + done.stderr


def test_a_text_of_one_process_that_is_refused_stops_both_processes(made, tmp_path):
  server, file, c = made
  record.run(resolve(c), tmp_path / "one")
  last = tuple(row_texts.texts_of(open_store(tmp_path / "one")[19])[0].text.tokens)
  server.forever, server.faults[last] = True, ["400"]
  done = in_two_processes(file, tmp_path / "two")
  lines = [line for line in done.stdout.splitlines() if "refuses to score a text" in line]
  assert sorted(line[:3] for line in lines) == ["[0]", "[1]"], done.stdout
  assert len(shards(tmp_path / "two")) == 3  # of 4: what is finished is kept


def test_a_killed_run_sends_no_text_twice(made, tmp_path):
  server, file, c = made
  record.run(resolve(c), tmp_path / "one")
  store = open_store(tmp_path / "one")
  first, last = (tuple(row_texts.texts_of(store[i])[0].text.tokens) for i in (0, 19))
  server.forever, server.faults[last] = True, ["silent"]
  command = [sys.executable, "-m", "distill_jax.cli", "record", f"--config={file}"]
  command += [f"--workdir={tmp_path / 'w'}"]
  with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as killed:
    end = time.monotonic() + 120
    # A shard is registered last: one that is not is recorded again.
    while len([*(tmp_path / "w").glob("*.array_record.json")]) < 3 and time.monotonic() < end:
      time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
  assert len(shards(tmp_path / "w")) == 3
  server.faults.clear()
  server.bodies.clear()
  assert record.run(resolve(c), tmp_path / "w")["recorded_now"] == 2  # of 20 rows in 4 shards
  assert shards(tmp_path / "one") == shards(tmp_path / "w")
  assert texts(server).count(first) == 2  # the row of the store that is compared
  assert len(texts(server)) == 2 + 2
