"""The start of a process of a pool. It does not import jax."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def start() -> None:
  """Prepares a worker: it leaves signals to its parent, and ends when its parent does."""
  for number in (signal.SIGTERM, signal.SIGINT):  # sent to the whole group of processes
    signal.signal(number, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  parent = multiprocessing.parent_process()
  assert parent is not None
  parent.join()
  os._exit(1)
