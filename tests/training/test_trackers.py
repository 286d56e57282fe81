"""Trackers: rows arrive once and in order, whatever the tracker does, and training does not wait.

The fast tests use a stand-in for the package wandb, which appends what it gets to a file; the slow
ones use each real tracker that is installed, without a network.
"""

import contextlib
import importlib.util
import json
import signal
import struct
import time

import pytest
import tiny

from distill_jax import config
from distill_jax.errors import InputError
from distill_jax.training import tracker_process, trackers
from distill_jax.training.metric_writer import MetricsWriter
from distill_jax.training.trackers import Follower

STAND_IN = """
import json, pathlib, time
BOX = pathlib.Path(__file__).parent
def Settings(**_): return None
class Run:
  def __init__(self, id): self.id, self.config = id, self
  def update(self, config, allow_val_change): self.write(["config", config["train"]["steps"]])
  def write(self, line):
    while (BOX / "hang").exists(): time.sleep(0.01)
    if (BOX / "fail").exists(): raise OSError("the network is away.\\nNo route to host")
    with open(BOX / "got.jsonl", "a") as f: f.write(json.dumps([self.id, *line]) + "\\n")
  def log(self, row, step): self.write([step, row["loss"]])
  def finish(self, exit_code): self.write(["finish", exit_code])
def init(id, **_):
  if (BOX / "refuse").exists(): raise ValueError("api_key not configured.")
  return Run(id)
"""


@pytest.fixture
def box(tmp_path, monkeypatch):
  """Returns the folder of the stand-in; files of the names in it make it fail."""
  box = tmp_path / "box"
  box.mkdir()
  (box / "wandb.py").write_text(STAND_IN)
  monkeypatch.syspath_prepend(str(box))
  monkeypatch.setattr(trackers, "EVERY", 0.01)
  return box


def got(box):
  """Returns (ids of the tracker's runs, [step, loss] of all rows, other calls)."""
  lines = [json.loads(line) for line in (box / "got.jsonl").read_text().splitlines()]
  rows = [line[1:] for line in lines if isinstance(line[1], int)]
  return {line[0] for line in lines}, rows, [line[1:] for line in lines if line[1:] not in rows]


def configured(folder, tracker="wandb", steps=10):
  c = tiny.tiny(folder)
  c.train.tracker, c.train.steps = tracker, steps
  return config.resolve(c)


def until(condition):
  end = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.01)


def test_rows_arrive_once_although_the_tracker_fails_and_the_run_resumes(box, tmp_path, capfd):
  c, run = configured(tmp_path), tmp_path / "run"
  with MetricsWriter(run) as writer, pytest.raises(KeyboardInterrupt), Follower(c, run, 10):
    for step in range(6):
      if step == 2:
        until(lambda: got(box)[1] == [[0, 0.0], [1, 0.5]])
        (box / "fail").touch()
      writer.write(step, {"loss": step / 2, "tokens": 1})
    until(lambda: "metrics: the network is away. Training" in capfd.readouterr().err)
    (box / "fail").unlink()
    until(lambda: len(got(box)[1]) == 6)
    (box / "fail").touch()
    writer.write(6, {"loss": 3.0})
    raise KeyboardInterrupt
  assert capfd.readouterr().err == ""  # one warning per process
  (box / "refuse").touch()  # at the beginning of the resumed run
  (box / "fail").unlink()
  with MetricsWriter(run, purge_step=4) as writer, Follower(c, run, 10):
    for step in range(4, 10):
      writer.write(step, {"loss": step / 2})
    until(lambda: "api_key not configured. Training" in capfd.readouterr().err)
    (box / "refuse").unlink()
  ids, rows, calls = got(box)
  assert len(ids) == 1 and rows == [[step, step / 2] for step in range(10)]
  assert calls == [["config", 10], ["config", 10], ["finish", 0]]
  with Follower(c, run, 10) as follower:
    assert follower._process is None  # everything is sent


def test_a_tracker_that_hangs_does_not_keep_the_run(box, tmp_path, monkeypatch, capfd):
  monkeypatch.setattr(trackers, "FINISH_SECONDS", 0.2)
  monkeypatch.setattr(trackers, "START_SECONDS", 0.2)
  (box / "hang").touch()
  run = tmp_path / "run"
  with MetricsWriter(run) as writer, Follower(configured(tmp_path), run, 10) as follower:
    for step in range(10):
      writer.write(step, {"loss": 1.0})
  assert follower._process.returncode == -signal.SIGKILL
  first, second = capfd.readouterr().err.splitlines()
  assert "wandb does not get the metrics: it did not start in 0 seconds" in first
  assert "wandb does not get the metrics: it did not finish in 0 seconds" in second


def test_a_process_that_is_killed_is_named(box, tmp_path, capfd):
  run = tmp_path / "run"
  with MetricsWriter(run) as writer, Follower(configured(tmp_path), run, 10) as follower:
    follower._process.kill()
    writer.write(0, {"loss": 1.0})
  assert "its process ended with exit code -9. Training continues" in capfd.readouterr().err


def test_a_tracker_that_cannot_be_used_is_refused_before_anything_compiles(box, tmp_path):
  c = configured(tmp_path)
  (box / "refuse").touch()
  refused = "wandb does not start a run: api_key not configured. Check its login"
  with (
    MetricsWriter(tmp_path / "run"),
    pytest.raises(InputError, match=refused),
    Follower(c, tmp_path / "run", 10),
  ):
    pass
  with pytest.raises(InputError, match="train.tracker is 'tensorboard'; expected one of"):
    trackers.check("tensorboard")
  if importlib.util.find_spec("mlflow") is None:
    with pytest.raises(InputError, match="expected an installed package. Run pip install .*mlflow"):
      trackers.check("mlflow")


def test_a_run_is_the_same_with_a_tracker_that_fails(box, tmp_path, tiny_run, capfd):
  """All rows are sent, although it fails at first; metrics.jsonl is that of a run without it."""
  from tiny_run import train

  (box / "fail").touch()
  c = tiny.tiny(tiny_run)
  c.train.tracker = "wandb"
  with pytest.raises(InputError, match="wandb does not start a run: the network is away"):
    train(c, tmp_path / "run")
  (box / "fail").unlink()
  train(c, tmp_path / "run")
  assert tiny.measured(tmp_path / "run") == tiny.measured(tiny_run / "whole")
  want = [[row["step"], row["loss"]] for row in tiny.measured(tmp_path / "run")]
  assert got(box)[1] == want


def rows_of_wandb(run, id):
  """Yields (step, loss) from the offline files, which are logs of records in blocks of 32 KiB."""
  from wandb.proto import wandb_internal_pb2

  for path in sorted(run.glob(f"wandb/offline-run-*-{id}/*.wandb")):
    raw, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(raw):
      if 2**15 - at % 2**15 < 7:  # no header begins here
        at += 2**15 - at % 2**15
        continue
      size, part = struct.unpack_from("<HB", raw, at + 4)  # behind a checksum
      record += raw[at + 7 : at + 7 + size]
      at += 7 + size
      if part in (1, 4):  # whole, or the last part
        message = wandb_internal_pb2.Record.FromString(record)
        record = b""
        if message.WhichOneof("record_type") == "history":
          items = {item.nested_key[0]: item.value_json for item in message.history.item}
          yield message.history.step.num, float(items["loss"])


def rows_of_mlflow(run, id):
  import mlflow

  client = mlflow.MlflowClient()
  assert client.get_run(id).data.params["train.steps"] == "10"
  assert client.get_run(id).info.status == "FINISHED"
  return [(point.step, point.value) for point in client.get_metric_history(id, "loss")]


def rows_of_trackio(run, id):
  from trackio.sqlite_storage import SQLiteStorage

  return [(row["step"], row["loss"]) for row in SQLiteStorage.get_logs(tracker_process.PROJECT, id)]


@pytest.mark.slow
@pytest.mark.parametrize(
  "tracker, rows_of",
  [("wandb", rows_of_wandb), ("mlflow", rows_of_mlflow), ("trackio", rows_of_trackio)],
)
def test_the_real_tracker_continues_its_run_without_a_network(
  tracker, rows_of, tmp_path, monkeypatch
):
  """The run is stopped after step 5 and resumed from step 4."""
  monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # trackio reads it when imported
  pytest.importorskip(tracker, reason=f"pip install 'distill-jax[{tracker}]'")
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
  c, run = configured(tmp_path, tracker), tmp_path / "run"
  for begin, end in ((0, 6), (4, 10)):
    with (
      contextlib.suppress(KeyboardInterrupt),
      MetricsWriter(run, purge_step=begin) as writer,
      Follower(c, run, 10),
    ):
      for step in range(begin, end):
        writer.write(step, {"loss": step / 2, "heldout/loss": 1.0, "kl/a b": float("nan")})
      if end < 10:
        raise KeyboardInterrupt
  saved = json.loads((run / "tracker.json").read_text())
  assert saved["sent"] == 9
  assert sorted(rows_of(run, saved["id"])) == [(step, step / 2) for step in range(10)]
