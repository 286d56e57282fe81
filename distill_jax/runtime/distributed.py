"""Runs of several processes: initialisation, communication and preemption."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import ClassVar, NoReturn, TypeVar

import jax
import numpy as np
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

from distill_jax.errors import InputError, Preempted, Unavailable, bad_value
from distill_jax.runtime.progress import Progress

LONGEST_WAIT_MS = 7 * 24 * 3600 * 1000  # for processes with more work
STOP_SECONDS = 60.0  # within which all processes stop that stop for the same reason
MAX_MESSAGE_BYTES = 2000  # maximum size of an error that process 0 sends to the others


def initialize(flag: str) -> None:
  """Connects this process to the other processes of a run. Call it before any other use of jax.

  Args:
    flag: The flag --distributed: "" for a run of one process; "auto" where jax detects the others
      (TPU pods, Slurm, Kubernetes, MPI); or "HOST:PORT,COUNT,INDEX" with the address of process 0,
      the number of processes, and the index of this process.

  Raises:
    InputError: The flag has another form.
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
      raise bad_value(
        "--distributed",
        flag,
        "'auto' or HOST:PORT,COUNT,INDEX, e.g. localhost:9000,2,0",
        "Correct the flag",
      ) from e
    jax.distributed.initialize(
      address, num_processes, process_id, cluster_detection_method="deactivate"
    )
  sys.excepthook = _print_and_leave
  Progress.shown = is_process_0()


def _print_and_leave(
  kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
  sys.__excepthook__(kind, error, trace)
  leave(1)


def process_count() -> int:
  """Returns the number of processes of the run."""
  return jax.process_count()


def require_one_process(verb: str, parts: str) -> None:
  """Raises InputError if a command that uses the cores of one machine has several processes.

  Args:
    verb: The verb of the command, which has a key `slice`.
    parts: What machines share, e.g. "shards".
  """
  if (count := jax.process_count()) > 1:
    raise InputError(
      f"{verb} is a run of {count} processes, but uses the cores of one machine. Run it without "
      f"--distributed; to use several machines, give each a share of the {parts}, e.g. "
      f"--config.{verb}.slice=0/16."
    )


def is_process_0() -> bool:
  """Returns True on process 0, which writes the files of a run."""
  return jax.process_index() == 0


def run_on_process_0(fn: Callable[[], None]) -> None:
  """Runs `fn` on process 0 and waits for it on all processes.

  Raises:
    InputError: `fn` raised it on process 0; so does every process.
    Unavailable: The same.
  """
  stopped: InputError | Unavailable | None = None
  if is_process_0():
    try:
      fn()
    except (InputError, Unavailable) as e:
      stopped = e
  if jax.process_count() > 1:
    kind = "" if stopped is None else type(stopped).__name__
    kind, _, message = text_of_process_0(f"{kind}:{stopped or ''}").partition(":")
    if kind and stopped is None:
      stopped = Unavailable(message) if kind == Unavailable.__name__ else InputError(message)
  if stopped is not None:
    raise stopped


def text_of_process_0(text: str) -> str:
  """Returns the text of process 0 on every process, truncated to MAX_MESSAGE_BYTES."""
  encoded = text.encode()[:MAX_MESSAGE_BYTES]
  buffer = np.frombuffer(encoded.ljust(MAX_MESSAGE_BYTES, b"\0"), np.uint8)
  received = broadcast_from_process_0(buffer)
  return received.tobytes().rstrip(b"\0").decode(errors="replace")


N = TypeVar("N", int, np.ndarray)


def max_over_processes(n: N) -> N:
  """Returns the maximum of `n` over all processes; of an array, that of each element."""
  if jax.process_count() == 1:
    return n
  largest = np.max(multihost_utils.process_allgather(np.asarray(n)), 0)
  return int(largest) if isinstance(n, int) else largest


def over_processes(n: int) -> list[int]:
  """Returns the number `n` of every process, in order."""
  if jax.process_count() == 1:
    return [n]
  return [int(x) for x in multihost_utils.process_allgather(np.int32(n))]


def broadcast_from_process_0(x: np.ndarray) -> np.ndarray:
  """Returns the array of process 0. `x` must have the same shape and dtype on all processes."""
  if jax.process_count() == 1:
    return x
  return np.asarray(multihost_utils.broadcast_one_to_all(x))


def barrier(name: str) -> None:
  """Waits until every process has called this with the same name."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def run_on_all_processes(name: str, fn: Callable[[], None]) -> None:
  """Runs `fn` on every process, which may take hours, and waits until all have finished.

  The processes wait in jax's coordination service: no device computes meanwhile, and a process
  that dies is noticed by its heartbeat.

  Args:
    name: A name that no other call has.
    fn: The function.

  Raises:
    InputError, Unavailable: `fn` raised it on one process; it is raised on every process.
  """
  raised: Exception | None = None
  try:
    fn()
  except (InputError, Unavailable, OSError) as error:
    raised = error
  client = global_state.client
  if jax.process_count() > 1 and client is not None:
    if raised is not None:
      passes = isinstance(raised, Unavailable)
      client.key_value_set(f"{name}/{jax.process_index()}", f"{int(passes)}{raised}")
    client.wait_at_barrier(name, LONGEST_WAIT_MS)
    failures = client.key_value_dir_get(f"{name}/")
    if raised is None and failures:
      message = failures[0][1]
      raise Unavailable(message[1:]) if message[0] == "1" else InputError(message[1:])
  if raised is not None:
    raise raised


def all_arrive(name: str, seconds: float = STOP_SECONDS) -> bool:
  """Returns whether every process calls this within some seconds, so that all can act together.

  Args:
    name: A name that no other call has.
    seconds: The time to wait for the others.
  """
  client = global_state.client
  if jax.process_count() > 1 and client is not None:
    try:
      client.wait_at_barrier(name, int(1000 * seconds))
    except jax.errors.JaxRuntimeError:  # the time is up
      return False
  return True


def leave(code: int) -> NoReturn:
  """Ends this process of a run that stops early.

  jax makes a process that ends wait 5 minutes for all others. If these do not stop within
  STOP_SECONDS, they wait for this one in a collective. Then it ends without them, and they fail.

  Args:
    code: The exit code.
  """
  if global_state.client is not None and not all_arrive("end of a stopped run", STOP_SECONDS):
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  sys.exit(code)


def to_host(x: jax.Array) -> np.ndarray:
  """Returns a global array as numpy, gathered if needed. Every process must call this."""
  if x.is_fully_addressable or x.is_fully_replicated:
    return np.asarray(x)
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def from_host(x: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
  """Returns a global array with a sharding, from the full array on every process."""
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


class Preemption:
  """Context manager that turns SIGTERM into a flag, which is checked at every step.

  With several processes, jax's preemption service handles the signal: a SIGTERM to any process
  stops all of them at the same check. Such contexts can be nested, e.g. that of sampling in that of
  training: the inner one sees the signal too, and the outer one saves what is done.
  """

  _active: ClassVar[list[Preemption]] = []
  _signalled: ClassVar[bool] = False  # since the outermost of them began
  _checks: ClassVar[int] = 0  # in this process so far, by which the service numbers them
  _deferred: ClassVar[bool] = False

  def __enter__(self) -> Preemption:
    is_inner = bool(self._active)
    if not is_inner:
      Preemption._signalled = False
    self._active.append(self)
    self._single = jax.process_count() == 1
    in_main_thread = threading.current_thread() is threading.main_thread()
    self._handles = self._single and in_main_thread and not is_inner
    if self._handles:
      self._previous_handler = signal.signal(signal.SIGTERM, self._on_signal)
    return self

  def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
    self._active.remove(self)
    if error is not None and not self._active:  # the work has stopped
      Preemption._signalled = False
    if self._handles:
      signal.signal(signal.SIGTERM, self._previous_handler)

  def _on_signal(self, *_: object) -> None:
    Preemption._signalled = True

  @classmethod
  def request(cls) -> None:
    """Asks all processes to stop at their next check, as SIGTERM does."""
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)  # to jax's preemption service
    else:
      Preemption._signalled = True

  @classmethod
  @contextlib.contextmanager
  def deferred(cls) -> Iterator[None]:
    """Context manager in which `reached` is False: what it runs, e.g. an evaluation, finishes."""
    before, Preemption._deferred = cls._deferred, True
    try:
      yield
    finally:
      Preemption._deferred = before

  def reached(self) -> bool:
    """Returns True to save and stop now. All processes must call this equally often."""
    if self._deferred:
      return False
    if self._single:
      return self._signalled
    Preemption._checks += 1
    if multihost_utils.reached_preemption_sync_point(Preemption._checks):  # it is True only once
      Preemption._signalled = True
    return self._signalled

  @classmethod
  def signalled(cls) -> bool:
    """Returns True if the only process of a run shall stop, for work that waits for others."""
    is_single = jax.process_count() == 1 and not cls._deferred
    return is_single and bool(cls._active) and cls._signalled

  @classmethod
  def check_late(cls, verb: str, kept: str) -> None:
    """Stops a command with more work if SIGTERM arrived too late for the work of the last context.

    Args:
      verb: See `stop`.
      kept: See `stop`.

    Raises:
      Preempted: SIGTERM arrived, on all processes.
    """
    if cls._signalled and not cls._active:
      raise cls.stop(verb, kept)

  @classmethod
  def stop(cls, verb: str, kept: str) -> Preempted:
    """Returns the exception to raise once all work is saved. The signal is then dealt with.

    Args:
      verb: The command.
      kept: What is saved, as a clause, e.g. "finished shards are kept".
    """
    if not cls._active:
      Preemption._signalled = False
    return Preempted(f"{verb} received SIGTERM; {kept}. Run the same command again to continue.")


@functools.cache
def host_device() -> jax.Device:
  """Returns the host's CPU, or the first device where jax does not use the CPU."""
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:
    return jax.local_devices()[0]
