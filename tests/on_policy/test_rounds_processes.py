"""Runs of `on_policy` that are killed with SIGKILL, and runs of several processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import tiny_on_policy
from scoring_server import Server

from distill_jax.data.tokenizers import load_tokenizer
from distill_jax.runtime import checkpoint
from distill_jax.training.metric_writer import read_metrics
from distill_jax.training.run_log import CLOCK

ROOT = Path(__file__).parents[2]
STORED = (
  "c.train.online, c.records.kind = False, 'labels'",
  "c.losses = {'soft': tiny_on_policy.config.loss('log_ratio')}",
  "c.on_policy.every, c.on_policy.keep_rounds, c.train.steps = 2, 1, 6",
  "c.records.tokens_per_shard = 4 * tiny_on_policy.LENGTH",
)
ALONE = [sys.executable, "-m", "distill_jax.cli", "on_policy"]
TOGETHER = [sys.executable, "launch/local.py", "--processes=2", "--devices=2", "--", "on_policy"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("processes")
  tiny_on_policy.write_config(folder / "config.py", folder, *STORED)
  return folder


def line(folder, workdir, start=ALONE, file="config.py"):
  return [*start, f"--config={folder / file}", f"--workdir={folder / workdir}"]


def finish(folder, workdir, start=ALONE, devices=4):
  environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)} if start is ALONE else None
  done = subprocess.run(
    line(folder, workdir, start),
    capture_output=True,
    text=True,
    cwd=ROOT,
    timeout=300,
    env=environment,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stderr


@pytest.fixture(scope="module")
def whole(folder):
  finish(folder, "whole")
  return folder / "whole"


def kill_when(folder, workdir, found, start=ALONE):
  """Kills a run with SIGKILL when a file of that pattern is in its workdir."""
  environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
  with subprocess.Popen(
    line(folder, workdir, start),
    cwd=ROOT,
    env=environment,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  ) as running:
    deadline = time.monotonic() + 200
    while not list((folder / workdir).glob(found)):
      assert running.poll() is None and time.monotonic() < deadline, running.stderr.read()
      time.sleep(0.002)
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()


def test_a_run_that_is_killed_in_every_phase_continues_to_the_same_bits(whole, folder):
  for found in (
    "rounds/00000/teacher/rollouts/*.array_record",  # it samples
    "rounds/00000/teacher/records",  # it scores
    "checkpoints/1*",  # it saves step 1
    "rounds/00001/rollouts.json",
    "rounds/00001/teacher/records/manifest.json",  # it trains
    "checkpoints/5",  # it has saved step 5, within a round
  ):
    kill_when(folder, "killed", found)
  finish(folder, "killed")
  assert tiny.measured(folder / "killed") == tiny.measured(whole)
  assert checkpoint.digest(folder / "killed") == checkpoint.digest(whole)
  left = [p.name for p in (folder / "killed/rounds").iterdir() if p.is_dir()]
  assert "00002" in left and "00000" not in left


def test_two_processes_stop_at_sigterm_while_they_sample(whole, folder):
  """The signal comes before round 0, so that sampling notices it; then one process continues."""
  with subprocess.Popen(
    line(folder, "stopped", TOGETHER), cwd=ROOT, stdout=subprocess.PIPE, text=True
  ) as running:
    deadline = time.monotonic() + 200
    while not list((folder / "stopped").glob("rounds/00000/teacher/rollouts")):
      assert running.poll() is None and time.monotonic() < deadline
      time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=200)
  assert running.returncode == os.EX_TEMPFAIL, output
  finish(folder, "stopped")
  same_up_to_rounding(whole, folder / "stopped")


def same_up_to_rounding(one, two):
  """Sums over devices of two processes add float32 numbers in another order."""
  for a, b in zip(read_metrics(one), read_metrics(two), strict=True):
    for name in a.keys() - CLOCK:
      assert a[name] == pytest.approx(b[name], rel=2e-5, abs=2e-6), (a["step"], name)


def test_two_processes_continue_the_run_of_one(whole, folder):
  kill_when(folder, "two", "checkpoints/3")
  finish(folder, "two", TOGETHER)
  same_up_to_rounding(whole, folder / "two")


def test_two_processes_save_their_state_if_the_server_is_gone(folder):
  with Server(encode=load_tokenizer(folder / "tokenizer.json").encode) as server:
    urls = f"c.generate.server.urls, c.generate.server.retries = ({server.url!r},), 0"
    changes = (*STORED, urls, "c.train.checkpoint_every = 0")
    tiny_on_policy.write_config(folder / "served.py", folder, *changes)
    command = line(folder, "served", TOGETHER, "served.py")
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
      deadline = time.monotonic() + 400
      while not list((folder / "served").glob("rounds/00001/teacher/rollouts")):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
      server.shutdown()
      server.server_close()
      output, _ = running.communicate(timeout=300)
  assert running.returncode == os.EX_TEMPFAIL, output
  assert output.count("run the same command again") == 2
  assert [p.name for p in (folder / "served/checkpoints").glob("[0-9]*")] == ["2"]
