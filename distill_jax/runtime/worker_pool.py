"""A pool of processes for the work of a command."""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from distill_jax.errors import bad_value
from distill_jax.runtime import pool_worker

ATTEMPTS = 3  # times that a task is run before its death ends the run
POLL_SECONDS = 0.5
_shared: list[Any] = []  # in a worker: the first argument of each call


class Pool:
  """A context manager that calls functions on many arguments, in several processes.

  The processes do not import jax. They end with this process, even if it is killed.

  Args:
    workers: The number of processes. 1: the functions are called in this process.
    shared: The first argument of each call. Each process has a copy.
    stopped: Returns True to stop; then `map` raises `stop`.
    stop: An exception.
    verb: The verb of the command, for messages.
    prepare: Called at the start of each process, before `shared` is made in it.
  """

  def __init__(
    self,
    workers: int,
    shared: Any,
    stopped: Callable[[], bool],
    stop: Exception,
    verb: str,
    prepare: Callable[[], None] | None = None,
  ):
    self._workers, self._shared = workers, shared
    self._verb, self._prepare = verb, prepare
    self._stopped, self._stop = stopped, stop
    self._executor: ProcessPoolExecutor | None = None

  def __enter__(self) -> Pool:
    self._start()
    return self

  def __exit__(self, *_: object) -> None:
    self._end()

  def map(
    self, function: Callable[..., Any], tasks: Iterable[tuple]
  ) -> Iterator[tuple[tuple, Any]]:
    """Yields (arguments, result) for each tuple of arguments, in order.

    A worker that dies, e.g. because the machine has no memory left, is replaced and its work
    repeated.

    Raises:
      InputError: Workers died ATTEMPTS times in succession.
    """
    if self._executor is None:
      for task in tasks:
        if self._stopped():
          raise self._stop
        yield task, function(self._shared, *task)
      return
    rest, waiting, deaths = iter(tasks), deque[tuple[tuple, Future[Any]]](), 0
    while True:
      try:
        for task in itertools.islice(rest, 3 * self._workers - len(waiting)):
          waiting.append((task, self._submit(function, task)))
        if not waiting:
          return
        task, future = waiting[0]
        while not wait([future], POLL_SECONDS).done:
          if self._stopped():
            raise self._stop
        result = future.result()
      except BrokenProcessPool as e:
        deaths += 1
        if deaths == ATTEMPTS:
          raise bad_value(
            f"{self._verb}.workers",
            self._workers,
            f"a number for which memory suffices, but a worker was killed {ATTEMPTS} times",
            "Set it to a smaller number",
          ) from e
        message = f"{self._verb}: a worker process was killed; its work is repeated."
        print(message, file=sys.stderr)
        self._end()
        self._start()
        waiting = deque((t, f if _finished(f) else self._submit(function, t)) for t, f in waiting)
      else:
        deaths = 0
        waiting.popleft()
        if self._stopped():
          raise self._stop
        yield task, result

  def _submit(self, function: Callable[..., Any], task: tuple) -> Future[Any]:
    assert self._executor is not None
    try:
      return self._executor.submit(_call, function, task)
    except BrokenProcessPool as e:
      future: Future[Any] = Future()
      future.set_exception(e)  # so that `map` repeats the task
      return future

  def _start(self) -> None:
    if self._workers > 1:
      self._executor = ProcessPoolExecutor(
        self._workers,
        multiprocessing.get_context("spawn"),
        _start_worker,
        (self._prepare, pickle.dumps(self._shared)),
      )

  def _end(self) -> None:
    if self._executor is not None:
      processes = list((self._executor._processes or {}).values())
      self._executor.shutdown(wait=False, cancel_futures=True)
      for process in processes:  # do not wait for what they do
        process.kill()
      for process in processes:
        process.join()


def _finished(future: Future[Any]) -> bool:
  return future.done() and not future.cancelled() and future.exception() is None


def _start_worker(prepare: Callable[[], None] | None, shared: bytes) -> None:
  pool_worker.start()
  if prepare is not None:
    prepare()
  _shared[:] = [pickle.loads(shared)]


def _call(function: Callable[..., Any], task: tuple) -> Any:
  return function(_shared[0], *task)
