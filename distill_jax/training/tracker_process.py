"""The process of a tracker: sends rows of metrics.jsonl to trackio, Weights & Biases or MLflow.

  python -m distill_jax.training.tracker_process

It reads one line of JSON from standard input, a `Job`, and follows the file until the input ends:
with the line "finished" if training is finished, without it if training has stopped or was killed.
Its output is empty if the tracker's run has started, or the reason why it has not.

The file is the queue. Every few seconds the process reads the lines behind the last one that it has
sent, at most `READ_BYTES` at a time, so that memory does not grow with what is unsent. If the
tracker fails, it warns once and sends the same rows again. tracker.json next to the file holds the
id of the tracker's run and the last step sent: {"tracker": "wandb", "id": "3f0c", "sent": 41}.

A class per tracker has `Tracker(id, name, folder, config)`, where id is None for a new run, `id`,
`log(rows)` and `finish(finished)`. Servers, projects and logins come from the tracker's own
environment variables. Nothing here imports jax.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, TypedDict

from distill_jax.runtime import extras
from distill_jax.runtime.json_io import write_json

FILE = "tracker.json"
PROJECT = "distill_jax"
READ_BYTES = 2**20
ROWS = 25  # sent at once: in most runs fewer metrics than MLflow accepts in one request
MLFLOW_METRICS, MLFLOW_PARAMS, MLFLOW_CHARACTERS = 1000, 100, 6000  # MLflow's limits

Row = dict[str, float]  # {"step": 7, "loss": 3.21}


class Job(TypedDict):
  """The input of the process."""

  tracker: str
  id: str | None  # of the tracker's run, None for a new one
  sent: int  # the last step that an earlier process has sent, or -1
  name: str  # of a new run
  metrics: str  # the path of metrics.jsonl
  config: dict[str, Any]
  every: float  # seconds between two sends
  finish_seconds: float  # for the last rows


class Trackio:
  """A run of trackio, on this machine or at TRACKIO_SERVER_URL or TRACKIO_SPACE_ID."""

  def __init__(self, id: str | None, name: str, folder: Path, config: dict[str, Any]):
    with extras.needed("trackio"):
      import trackio

    self.id = id or f"{name}-{uuid.uuid4().hex[:8]}"  # trackio finds runs by their names
    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    machine = {"auto_log_gpu": False, "auto_log_cpu": False}
    self._run = trackio.init(
      project, name=self.id, config=config, resume="allow", embed=False, **machine
    )

  def log(self, rows: Sequence[Row]) -> None:
    for row in rows:
      self._run.log(_metrics(row), step=int(row["step"]))

  def finish(self, finished: bool) -> None:
    del finished
    self._run.finish()


class Wandb:
  """A run of Weights & Biases; WANDB_MODE=offline keeps it in the folder `wandb` of the run."""

  def __init__(self, id: str | None, name: str, folder: Path, config: dict[str, Any]):
    with extras.needed("wandb"):
      import wandb

    self._run = wandb.init(
      project=os.environ.get("WANDB_PROJECT", PROJECT),
      name=name,
      id=id or uuid.uuid4().hex[:8],
      resume="allow",
      dir=folder,
      settings=wandb.Settings(console="off"),  # the terminal's lines stay here
    )
    self._run.config.update(config, allow_val_change=True)
    self.id = self._run.id

  def log(self, rows: Sequence[Row]) -> None:
    for row in rows:
      self._run.log(_metrics(row), step=int(row["step"]))

  def finish(self, finished: bool) -> None:
    self._run.finish(exit_code=0 if finished else 1)


class Mlflow:
  """A run of MLflow at MLFLOW_TRACKING_URI, in the experiment MLFLOW_EXPERIMENT_NAME."""

  def __init__(self, id: str | None, name: str, folder: Path, config: dict[str, Any]):
    with extras.needed("mlflow"):
      import mlflow
      from mlflow import entities

    self._entities, self._client = entities, mlflow.MlflowClient()
    if id is None:
      title = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
      found = self._client.get_experiment_by_name(title)
      experiment = found.experiment_id if found else self._client.create_experiment(title)
      self.id = self._client.create_run(experiment, run_name=name).info.run_id
      params = [
        entities.Param(_mlflow_key(key), str(value)[:MLFLOW_CHARACTERS])
        for key, value in _flat(config)
      ]
      for some in _parts(params, MLFLOW_PARAMS):
        self._client.log_batch(self.id, params=some)
    else:
      self.id = id
      self._client.update_run(id, status="RUNNING")

  def log(self, rows: Sequence[Row]) -> None:
    now = round(time.time() * 1000)
    metrics = [
      self._entities.Metric(_mlflow_key(name), value, now, int(row["step"]))
      for row in rows
      for name, value in _metrics(row).items()
    ]
    for some in _parts(metrics, MLFLOW_METRICS):
      self._client.log_batch(self.id, metrics=some)

  def finish(self, finished: bool) -> None:
    self._client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


TRACKERS: dict[str, Any] = {"trackio": Trackio, "wandb": Wandb, "mlflow": Mlflow}


class Sender:
  """Sends rows of a job's file to its tracker."""

  def __init__(self, job: Job):
    self._job, self._path = job, Path(job["metrics"])
    self._offset, self._sent = 0, job["sent"]
    self._tracker: Any = None

  @property
  def is_new(self) -> bool:
    """True if the tracker's run does not exist yet."""
    return self._tracker is None and self._job["id"] is None

  def send(self) -> None:
    """Starts the tracker's run, and sends the rows that are not sent; after a failure, again."""
    if self._tracker is None:
      job, folder = self._job, self._path.parent
      self._tracker = TRACKERS[job["tracker"]](job["id"], job["name"], folder, job["config"])
      self._save()
    while lines := self._lines():
      rows = [{name: float(x) for name, x in json.loads(line).items()} for line in lines]
      for some in _parts([row for row in rows if row["step"] > self._sent], ROWS):
        self._tracker.log(some)
        self._sent = int(some[-1]["step"])
        self._save()
      self._offset += sum(map(len, lines))

  def finish(self, finished: bool) -> None:
    """Ends the tracker's run."""
    self._tracker.finish(finished)

  def _lines(self) -> list[bytes]:
    """Returns the next complete lines. The last one may be incomplete."""
    with self._path.open("rb") as f:
      f.seek(self._offset)
      lines = f.read(READ_BYTES).splitlines(keepends=True)
    return [line for line in lines if line.endswith(b"\n")]

  def _save(self) -> None:
    saved = {"tracker": self._job["tracker"], "id": self._tracker.id, "sent": self._sent}
    write_json(self._path.with_name(FILE), saved)


def follow(job: Job, report: TextIO) -> None:
  """Runs until standard input ends; see the module's docstring."""
  sender, finished, warned = Sender(job), None, False
  while True:
    try:
      sender.send()
      _report(report, "")
      if finished is not None:
        sender.finish(finished)
    except Exception as e:  # of any kind: it is the tracker's, and training continues
      if sender.is_new and _report(report, _line(e)):
        return
      if not warned:
        warn(job["tracker"], _line(e))
        warned = True
    if finished is not None:
      return
    if select.select([sys.stdin], [], [], job["every"])[0]:
      finished = sys.stdin.readline() == "finished\n"
      signal.alarm(max(1, round(job["finish_seconds"])))  # ends this process if the tracker hangs


def warn(tracker: str, reason: str) -> None:
  """Prints that rows do not arrive."""
  print(
    f"{tracker} does not get the metrics: {reason}. Training continues, metrics.jsonl has every "
    "row, and rows are sent when the tracker answers again, or by the next train.",
    file=sys.stderr,
    flush=True,
  )


def _report(report: TextIO, line: str) -> bool:
  """Writes the result of the start once; returns False if nothing waits for it."""
  if report.closed:
    return False
  try:
    print(line, file=report, flush=True)
    report.close()
  except BrokenPipeError:
    with contextlib.suppress(BrokenPipeError):
      report.close()
    return False
  return True


def _line(error: Exception) -> str:
  """Returns an error as a part of a sentence: its first line, without a full stop."""
  text = str(error).strip() or type(error).__name__
  return text.splitlines()[0].rstrip(".")[:300]


def _metrics(row: Row) -> Row:
  return {name: value for name, value in row.items() if name != "step"}


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Yields (dotted key, value) of a tree of dicts."""
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _flat(value, f"{prefix}{key}.")
    else:
      yield prefix + key, value


def _mlflow_key(name: str) -> str:
  """Returns the name with only the characters that MLflow allows."""
  return re.sub(r"[^\w\-./: ]", "_", name, flags=re.ASCII)


def _parts(items: list[Any], size: int) -> Iterator[list[Any]]:
  return (items[i : i + size] for i in range(0, len(items), size))


def main() -> None:
  """Runs the job on standard input."""
  report = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # what trackers print goes to standard error
  follow(json.loads(sys.stdin.readline()), report)


if __name__ == "__main__":
  main()
