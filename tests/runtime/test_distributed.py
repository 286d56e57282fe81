"""Tests of two processes with two devices each, against one process with four devices."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import mesh_worker
import numpy as np
import pytest
import tiny
from local_stores import free_port
from safetensors.numpy import load_file

from distill_jax import config
from distill_jax.commands import export
from distill_jax.commands.evaluate import run as evaluate
from distill_jax.commands.record import run as record
from distill_jax.errors import InputError
from distill_jax.records import job
from distill_jax.records.store import open_store
from distill_jax.runtime.workdir import Workdir
from distill_jax.training import loop as training
from distill_jax.training.metric_writer import read_metrics
from distill_jax.training.run_log import CLOCK

ROOT = Path(__file__).parents[2]


def made(folder: Path):
  """Returns the same config in this process."""
  changes = [
    'c.teacher.source = ""',
    "c.train.steps = 12",
    "c.evaluate.batch_size = 4",
    f'c.evaluate.models = {{"distilled": "run:{folder}/one"}}',
  ]
  file = tiny.write_config(folder / "config.py", folder, *changes)
  scope: dict = {}
  exec(file.read_text(), scope)
  return scope["get_config"]()


def launch(folder: Path, verb: str, workdir: str, *flags: str, processes=2, devices=2) -> list[str]:
  return [
    sys.executable,
    "launch/local.py",
    f"--processes={processes}",
    f"--devices={devices}",
    "--",
    verb,
    f"--config={folder / 'config.py'}",
    f"--workdir={folder / workdir}",
    *flags,
  ]


def run(line: list[str], code: int = 0) -> str:
  done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=300)
  assert done.returncode == code, done.stdout + done.stderr
  return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Returns a folder with a run that this process recorded and trained on four devices."""
  path = tmp_path_factory.mktemp("processes")
  c = config.resolve(made(path))
  record(c, path / "records")
  with Workdir(path / "one", c) as workdir:
    training.train(c, workdir)
  return path


@pytest.mark.slow
def test_two_processes_record_the_same_store(folder):
  """Each process writes its own shards; targets differ only by ties in float32."""
  run(launch(folder, "record", "records2"))
  one, two = open_store(folder / "records"), open_store(folder / "records2")
  assert len(one) == len(two)
  assert [s.count for s in one.manifest.shards] == [s.count for s in two.manifest.shards]
  same = 0
  for i in range(len(one)):
    a, b = one[i], two[i]
    np.testing.assert_array_equal(a["tokens_T"], b["tokens_T"])
    np.testing.assert_allclose(a["entropy_T"], b["entropy_T"], rtol=1e-3)
    same += np.array_equal(a["ids_TK"], b["ids_TK"])
  assert same > 0.8 * len(one)


def test_training_resumes_with_another_number_of_processes(folder):
  """SIGTERM to the launcher gives exit code 75; one process on another mesh finishes the run.

  The signal comes while the step compiles: jax looks for one once a second, and twelve small
  steps take less than that.
  """
  line = launch(folder, "train", "two", "--config.train.checkpoint_every=1000")
  opened = folder / "two" / "config.json"
  with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True) as launched:
    deadline = time.monotonic() + 200
    while not opened.exists():
      assert launched.poll() is None and time.monotonic() < deadline
      time.sleep(0.01)
    launched.send_signal(signal.SIGTERM)
    output, _ = launched.communicate(timeout=200)
  assert launched.returncode == os.EX_TEMPFAIL, output
  step = int(re.search(r"step (\d+) of 12 is saved", output)[1])
  assert 1 <= step < 12
  c = made(folder)
  c.train.checkpoint_every, c.mesh.tensor = 1000, 2
  resolved = config.resolve(c)
  with Workdir(folder / "two", resolved) as workdir:
    training.train(resolved, workdir)
  compare(folder / "one", folder / "two")


def compare(one: Path, two: Path) -> None:
  """Checks sums over four devices in one or two processes: float32 in another order."""
  one, two = read_metrics(one), read_metrics(two)
  assert [row["step"] for row in two] == list(range(12))
  for a, b in zip(one, two, strict=True):
    for name in a.keys() - CLOCK:
      assert a[name] == pytest.approx(b[name], rel=2e-5, abs=2e-6), (a["step"], name)


@pytest.mark.slow
def test_four_processes_of_two_devices(folder):
  line = launch(folder, "record", "records4", processes=4, devices=2)
  run([*line, "--config.records.batch_size=8"])
  assert len(open_store(folder / "records4")) == len(open_store(folder / "records"))
  flags = ["--config.train.batch_size=8", "--config.train.steps=4"]
  run([*launch(folder, "train", "four", processes=4, devices=2), *flags])
  c = made(folder)
  c.train.batch_size, c.train.steps = 8, 4
  resolved = config.resolve(c)
  with Workdir(folder / "eight", resolved) as workdir:
    training.train(resolved, workdir)
  for a, b in zip(read_metrics(folder / "four"), read_metrics(folder / "eight"), strict=True):
    assert a["loss"] == pytest.approx(b["loss"], rel=2e-5)


REFUSAL = (
  "records.tokens_per_shard is 100000; expected a size that makes at least 2 shards, one for each "
  "process that writes, instead of 1"
)


def test_more_writers_than_shards_are_refused():
  store = SimpleNamespace(manifest=SimpleNamespace(ranges=[range(40)]))
  part = SimpleNamespace(rows=SimpleNamespace(writer_B=np.array([0, 0, 1, 1])), writer=store)
  with pytest.raises(InputError, match=REFUSAL):
    job.check_shards(config.RecordsOptions(tokens_per_shard=100_000), [part])


@pytest.mark.slow
def test_more_processes_than_shards_are_refused(folder):
  flag = "--config.records.tokens_per_shard=100000"
  assert REFUSAL in run([*launch(folder, "record", "one_shard"), flag], code=2)


@pytest.mark.slow
def test_two_processes_evaluate_and_export_the_same_model(folder):
  """Two processes read, evaluate and export a run of one process with the same results."""
  c, there = made(folder), made(folder)
  there.export.dir = str(folder / "export2")
  jobs = [("evaluate", folder / "evaluated", c), ("export", folder / "one", there)]
  jobs = [(verb, path, config.resolve(changed)) for verb, path, changed in jobs]
  mesh_worker.run(jobs, folder / "jobs.json", processes=2, devices=2)
  want = evaluate(config.resolve(c), folder)["models"]
  got = json.loads((folder / "evaluated" / "evaluation.json").read_text())["models"]
  for model, row in want.items():
    for key in ("ce", "kl", "agreement", "parameters", "bytes"):
      assert got[model][key] == pytest.approx(row[key], rel=1e-5, abs=1e-6), (model, key)
  c.export.dir = str(folder / "export1")
  export.run(config.resolve(c), folder / "one")
  a, b = (load_file(folder / d / "model.safetensors") for d in ("export1", "export2"))
  assert a.keys() == b.keys()
  for key, x in a.items():
    np.testing.assert_array_equal(x, b[key])


def test_an_error_of_process_0_stops_all_processes(folder):
  """Process 0 finds another config in the workdir; every process reports it with exit code 2."""
  line = launch(folder, "train", "one", "--config.optim.peak_lr=0.5")
  output = run(line, code=2)
  for i in range(2):
    assert f"[{i}] error: {folder / 'one'} holds a run with optim.peak_lr=0.01" in output


@pytest.mark.slow
def test_a_disk_of_one_process_that_is_full_stops_all_processes(folder):
  """A folder in place of a file replaces a full disk: the system raises a similar error."""
  for number in range(4):
    (folder / f"full/.writing-{number:05d}-1-of-2").mkdir(parents=True)
  output = run(launch(folder, "record", "full"), code=2)
  for i in range(2):
    assert re.search(rf"\[{i}\] error: .*records-0000\d.array_record cannot be written", output)


ARRIVING = """
import sys
from distill_jax.runtime import distributed
distributed.initialize(sys.argv[1])
print(distributed.all_arrive("both"))
if distributed.is_process_0():
  print(distributed.all_arrive("one", 1.0))
distributed.run_on_all_processes("end", lambda: None)
"""


def two_processes(script):
  """Runs a script in two processes with the argument --distributed.

  Returns the processes, and the output and the errors of each.
  """
  port, pipe = free_port(), subprocess.PIPE
  workers = []
  for i in range(2):
    line = [sys.executable, "-c", script, f"localhost:{port},2,{i}"]
    workers.append(subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, cwd=ROOT))
  return workers, [worker.communicate(timeout=200) for worker in workers]


@pytest.mark.slow
def test_all_arrive_only_if_every_process_does():
  printed = [out.split() for out, _ in two_processes(ARRIVING)[1]]
  assert printed == [["True", "False"], ["True"]]


LEAVING = """
import sys
import jax
from distill_jax import cli
from distill_jax.runtime import distributed
distributed.STOP_SECONDS = 1.0
distributed.initialize(sys.argv[1])
distributed.barrier("begin")
if jax.process_index() == {alone}:
  {failure}
distributed.barrier("step")  # a collective, in which the other process waits
"""


@pytest.mark.slow
@pytest.mark.parametrize("alone", [0, 1])
@pytest.mark.parametrize(
  ("failure", "code", "message"),
  [
    ('cli._stop(75, "The store does not answer.")', 75, "The store does not answer."),
    ('raise RuntimeError("unexpected")', 1, "RuntimeError: unexpected"),
  ],
)
def test_a_process_that_stops_alone_does_not_wait_for_the_other(failure, code, message, alone):
  workers, outputs = two_processes(LEAVING.format(failure=failure, alone=alone))
  errors = [err for _, err in outputs]
  assert message in errors[alone] and workers[alone].returncode == code
  other = 1 - alone
  assert message not in errors[other] and workers[other].returncode != 0


def test_dry_run_prints_what_would_run():
  output = run(
    [sys.executable, "launch/local.py", "--dry_run", "--devices=2", "--", "train", "--x=$(rm a)"]
  )
  assert len(output.splitlines()) == 2
  assert "JAX_NUM_CPU_DEVICES=2" in output and "'--x=$(rm a)'" in output
  assert int(re.search(r" PJRT_NPROC=(\d+) ", output)[1]) >= 4 * 2
