"""Trackers: the metrics of a run in trackio, Weights & Biases or MLflow.

A separate process (tracker_process.py) follows metrics.jsonl. So a tracker that fails, hangs or
crashes neither stops nor slows training, and can be killed when training ends. The next call of
`train` in the folder sends what is missing, also if training is finished.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from distill_jax import config as configs
from distill_jax.errors import InputError, bad_value, check_choice
from distill_jax.runtime import distributed, extras, storage
from distill_jax.runtime.json_io import read_object
from distill_jax.training import metric_writer, tracker_process
from distill_jax.training.tracker_process import TRACKERS, Job

EVERY = 5.0  # seconds between two sends
START_SECONDS = 120.0  # that training waits for a new run of the tracker, before it compiles
FINISH_SECONDS = 30.0  # that training waits for the last rows


def check(tracker: str) -> None:
  """Checks `train.tracker`.

  Raises:
    InputError: The tracker is unknown, or its package is not installed.
  """
  check_choice("train.tracker", tracker, ("", *TRACKERS), "Correct it")
  if tracker and extras.not_installed(tracker):
    raise bad_value("train.tracker", tracker, "an installed package", extras.install(tracker))


class Follower:
  """Context manager around the process that sends metrics.jsonl to the config's tracker.

  Enter it after the file is opened for writing, which removes the rows that a resumed run writes
  again. Process 0 of a run starts the process.

  Args:
    config: The config of the run.
    folder: The folder of the run.
    steps: Number of steps of the run. If all of them are sent, no process is started.

  Raises:
    InputError: A new run of the tracker cannot be started. If the run of the tracker exists, this
      is a warning, as all later failures are.
  """

  def __init__(self, config: configs.Config, folder: Path, steps: int):
    self._config, self._folder, self._steps = config, folder, steps
    self._tracker = config.train.tracker
    self._process: subprocess.Popen[bytes] | None = None

  def __enter__(self) -> Follower:
    if self._tracker:
      distributed.run_on_process_0(self._start)
    return self

  def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
    if self._process is None:
      return
    try:
      self._process.communicate(b"" if error_type else b"finished\n", FINISH_SECONDS)
      if code := self._process.returncode:
        tracker_process.warn(self._tracker, f"its process ended with exit code {code}")
    except subprocess.TimeoutExpired:
      reason = f"it did not finish in {FINISH_SECONDS:.0f} seconds"
      tracker_process.warn(self._tracker, reason)
    self._kill()

  def _start(self) -> None:
    job = self._job()
    if job["sent"] + 1 >= self._steps:
      return
    self._process = subprocess.Popen(
      [sys.executable, "-P", "-m", "distill_jax.training.tracker_process"],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      bufsize=0,
      env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
      start_new_session=True,  # a group of processes, which Ctrl-C does not reach
    )
    assert self._process.stdin is not None and self._process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.write(json.dumps(job).encode() + b"\n")
    if job["id"] is None:
      if not select.select([self._process.stdout], [], [], START_SECONDS)[0]:
        reason = f"it did not start in {START_SECONDS:.0f} seconds"
        tracker_process.warn(self._tracker, reason)
      elif (reason := self._process.stdout.readline().decode()) != "\n":
        self._kill()
        raise InputError(
          f"{self._tracker} does not start a run: {reason.strip() or 'its process ended'}. Check "
          "its login and address, or set train.tracker=''."
        )
    self._process.stdout.close()

  def _job(self) -> Job:
    path = storage.fetched(self._folder / tracker_process.FILE)
    saved = read_object(path, "Remove the file") if path.is_file() else {}
    if saved.get("tracker") != self._tracker:
      saved = {}
    return Job(
      tracker=self._tracker,
      id=saved.get("id"),
      sent=saved.get("sent", -1),
      name="-".join(Path(storage.location(self._folder)).parts[-2:]),
      metrics=str(self._folder / metric_writer.FILE),
      config=configs.to_dict(self._config),
      every=EVERY,
      finish_seconds=FINISH_SECONDS,
    )

  def _kill(self) -> None:
    """Ends the process and those that the tracker has started."""
    assert self._process is not None
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self._process.pid, signal.SIGKILL)
    self._process.wait()
