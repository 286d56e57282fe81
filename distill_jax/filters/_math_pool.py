"""A pool of processes that compare two answers with sympy."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import select
import signal
import subprocess
import sys
from pathlib import Path

from distill_jax.errors import InputError

WORKER = Path(__file__).with_name("_math_worker.py")
START_SECONDS = 120.0  # maximum time for a worker to import sympy
SLACK = 10.0  # a worker is killed after this many wall-clock seconds per second of its CPU limit


@functools.lru_cache(2**12)
def equal(key: str, answer: str, seconds: float) -> str:
  """Returns the verdict of a pool of this process; see `Pool.equal`. Recent verdicts are kept."""
  return _pool(seconds).equal(key, answer)


@functools.cache
def _pool(seconds: float) -> Pool:
  return Pool(seconds)


class Pool:
  """One worker process per thread that calls `equal`.

  A worker imports sympy once, in about 3 seconds, and ends with its input. A comparison that takes
  too long or crashes ends a fork of the worker, which is replaced in milliseconds.

  Args:
    seconds: The CPU time limit of one comparison.
  """

  def __init__(self, seconds: float):
    self._seconds = seconds
    self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()

  def equal(self, key: str, answer: str) -> str:
    """Compares an answer with the answer key.

    Returns:
      "equal", "other" (not equal), "key" (the key cannot be parsed), "timeout" or "crashed".

    Raises:
      InputError: If a worker does not start.
    """
    try:
      worker = self._idle.get_nowait()
    except queue.Empty:
      worker = self._start()
    assert worker.stdin is not None
    try:
      worker.stdin.write(json.dumps([key, answer]).encode() + b"\n")
      worker.stdin.flush()
      verdict = _line(worker, self._seconds * SLACK)
    except BrokenPipeError:
      verdict = ""
    if verdict:
      self._idle.put(worker)
      return verdict
    out_of_time = worker.poll() is None
    _kill(worker)
    return "timeout" if out_of_time else "crashed"

  def _start(self) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-I", str(WORKER), str(self._seconds)]
    worker = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      bufsize=0,
      start_new_session=True,  # a group of processes, for _kill
    )
    if _line(worker, START_SECONDS) != "ready":
      raise InputError(
        f"math-verify did not start within {START_SECONDS:.0f} s. Run `{' '.join(command)}` to see "
        "the reason."
      )
    return worker


def _kill(worker: subprocess.Popen[bytes]) -> None:
  """Ends a worker and its fork."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(worker.pid, signal.SIGKILL)
  worker.communicate()


def _line(worker: subprocess.Popen[bytes], seconds: float) -> str:
  """Returns a worker's next line, or "" if its output ends or no line arrives in time."""
  assert worker.stdout is not None
  if not select.select([worker.stdout], [], [], seconds)[0]:
    return ""
  line = worker.stdout.readline()
  if not line and worker.poll() is None:
    worker.wait(5)
  return line.decode().strip()
