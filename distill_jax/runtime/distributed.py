"""One run on several processes: which one writes, what all agree on, and when all stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from distill_jax.errors import InputError, Preempted
from distill_jax.runtime.progress import Progress

MAX_MESSAGE_BYTES = 2000  # of an error that one process sends to all


def initialize(flag: str) -> None:
  """Joins this process to the others of a run. Call it before any other use of jax.

  Args:
    flag: the flag --distributed. "" for a run of one process; "auto" where jax finds the others by
      itself (TPU pods, Slurm, Kubernetes, MPI); or "HOST:PORT,COUNT,INDEX": the address of process
      0, the number of processes, and which one this is.

  Raises:
    InputError: the flag is none of these.
  """
  if not flag:
    return
  if flag == "auto":
    jax.distributed.initialize()
  else:
    try:
      address, count, index = flag.split(",")
      num_processes, process_id = int(count), int(index)
    except ValueError as e:
      raise InputError(
        f"--distributed is {flag!r}; expected 'auto' or HOST:PORT,COUNT,INDEX, such as "
        "'localhost:9000,2,0'"
      ) from e
    jax.distributed.initialize(
      address, num_processes, process_id, cluster_detection_method="deactivate"
    )
  Progress.shown = is_process_0()


def is_process_0() -> bool:
  """Returns whether this process writes the files that a run writes once."""
  return jax.process_index() == 0


def run_on_process_0(fn: Callable[[], None]) -> None:
  """Runs `fn` on process 0 alone, and waits for it on all.

  Raises:
    InputError: `fn` raised it; the error is raised on every process.
  """
  error = ""
  if is_process_0():
    try:
      fn()
    except InputError as e:
      error = str(e)
  if jax.process_count() > 1:
    error = _broadcast_text(error)
  if error:
    raise InputError(error)


def _broadcast_text(text: str) -> str:
  """Returns the text of process 0 on every process, cut off after MAX_MESSAGE_BYTES."""
  encoded = text.encode()[:MAX_MESSAGE_BYTES]
  buffer = np.frombuffer(encoded.ljust(MAX_MESSAGE_BYTES, b"\0"), np.uint8)
  received = broadcast_from_process_0(buffer)
  return received.tobytes().rstrip(b"\0").decode(errors="replace")


def max_over_processes(n: int) -> int:
  """Returns the largest `n` of any process."""
  if jax.process_count() == 1:
    return n
  return int(np.max(multihost_utils.process_allgather(np.int32(n))))


def broadcast_from_process_0(x: np.ndarray) -> np.ndarray:
  """Returns the array of process 0; `x` has the same shape and dtype on all processes."""
  if jax.process_count() == 1:
    return x
  return np.asarray(multihost_utils.broadcast_one_to_all(x))


def barrier(name: str) -> None:
  """Waits until every process is here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def to_host(x: jax.Array) -> np.ndarray:
  """Returns a whole array, wherever its parts are. Every process has to call this."""
  if x.is_fully_addressable or x.is_fully_replicated:
    return np.asarray(x)
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def from_host(x: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
  """Returns an array in a sharding, given the whole of it on every process."""
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


class Preemption:
  """Turns SIGTERM into a flag that is read once a step; a context manager.

  With several processes, a SIGTERM to any of them stops all at the same step: there jax's
  preemption service handles the signal.
  """

  def __enter__(self) -> Preemption:
    self._signalled = False
    self._single = jax.process_count() == 1
    self._handles = self._single and threading.current_thread() is threading.main_thread()
    if self._handles:
      self._previous_handler = signal.signal(signal.SIGTERM, self._on_signal)
    return self

  def __exit__(self, *_: object) -> None:
    if self._handles:
      signal.signal(signal.SIGTERM, self._previous_handler)

  def _on_signal(self, *_: object) -> None:
    self._signalled = True

  def reached(self, step: int) -> bool:
    """Returns whether to save and stop now. Every process has to call this at every step."""
    return self._signalled if self._single else multihost_utils.reached_preemption_sync_point(step)

  @staticmethod
  def stop(verb: str, kept: str) -> Preempted:
    """Returns the exception to raise once all is saved.

    Args:
      verb: the command.
      kept: the work that is saved, as in "finished shards are kept".
    """
    return Preempted(f"{verb} was told to stop; {kept}: run the same command again to go on")
