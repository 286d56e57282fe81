"""One run on several processes: who writes, what all must agree on, and when all stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from distill_jax.errors import InputError, Preempted
from distill_jax.runtime.progress import Progress

MESSAGE = 2000  # bytes of a refusal that all processes hear


def initialize(spec: str) -> None:
  """Makes this process one of a run; before anything else is asked of jax.

  Args:
    spec: "" for a run of one process; "auto" where jax can tell by itself (TPU pods, Slurm,
      Kubernetes, MPI); or "HOST:PORT,COUNT,INDEX".
  """
  if not spec:
    return
  if spec == "auto":
    jax.distributed.initialize()
  else:
    try:
      address, count, index = spec.split(",")
      n, i = int(count), int(index)
    except ValueError as e:
      raise InputError(
        f"--distributed is {spec!r}; it is 'auto', or HOST:PORT,COUNT,INDEX as 'localhost:9000,2,0'"
      ) from e
    jax.distributed.initialize(address, n, i, cluster_detection_method="deactivate")
  Progress.shown = is_process_0()


def is_process_0() -> bool:
  """Whether this process writes what a run writes once."""
  return jax.process_index() == 0


def run_on_process_0(fn: Callable[[], None]) -> None:
  """Runs `fn` on the first process alone; what it refuses there, all refuse. All wait for it."""
  refusal = ""
  if is_process_0():
    try:
      fn()
    except InputError as e:
      refusal = str(e)
  if jax.process_count() > 1:
    heard = np.zeros(MESSAGE, np.uint8)
    said = refusal.encode()[:MESSAGE]
    heard[: len(said)] = np.frombuffer(said, np.uint8)
    heard = np.asarray(multihost_utils.broadcast_one_to_all(heard))
    refusal = heard.tobytes().rstrip(b"\0").decode(errors="replace")
  if refusal:
    raise InputError(refusal)


def max_over_processes(n: int) -> int:
  """The largest `n` of any process."""
  if jax.process_count() == 1:
    return n
  return int(np.max(multihost_utils.process_allgather(np.int32(n))))


def broadcast_from_process_0(x: np.ndarray) -> np.ndarray:
  """The first process's array, which is of the same shape and dtype in all of them."""
  if jax.process_count() == 1:
    return x
  return np.asarray(multihost_utils.broadcast_one_to_all(x))


def barrier(what: str) -> None:
  """Until every process is here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def to_host(x: jax.Array) -> np.ndarray:
  """The whole of an array on every process, wherever its parts are; all must ask."""
  if x.is_fully_addressable or x.is_fully_replicated:
    return np.asarray(x)
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def from_host(x: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
  """The inverse: an array that every process has whole, spread as `where` says."""
  return jax.make_array_from_callback(x.shape, where, lambda index: x[index])


class Preemption:
  """Turns SIGTERM into a question asked once a step; a context manager.

  With several processes the notice of any reaches all, and they say yes at the same step:
  jax's preemption service listens to the signal there.
  """

  def __enter__(self) -> Preemption:
    self._told = False
    self._alone = jax.process_count() == 1
    self._listens = self._alone and threading.current_thread() is threading.main_thread()
    if self._listens:
      self._before = signal.signal(signal.SIGTERM, self._tell)
    return self

  def __exit__(self, *_: object) -> None:
    if self._listens:
      signal.signal(signal.SIGTERM, self._before)

  def _tell(self, *_: Any) -> None:
    self._told = True

  def reached(self, step: int) -> bool:
    """Whether to save and stop now; every process asks at every step."""
    return self._told if self._alone else multihost_utils.reached_preemption_sync_point(step)

  @staticmethod
  def stop(verb: str, kept: str) -> Preempted:
    return Preempted(f"{verb} was told to stop; {kept}: run the same command again to go on")
