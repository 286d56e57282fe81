"""The first seconds of a run: all its processes see one workdir, and no other run writes there.

With several processes, process 0 writes a file, and the run is refused unless all others see it. A
run at a URL has a lease there, as a run on a disk has a lock: the file `.run` with its host and a
counter that grows every BEAT seconds. A run that finds such a file watches it for WATCH seconds. If
it changes, its run is alive, and the new one is refused; otherwise that run was killed, and the new
one takes the folder. Times are not compared, so clocks may differ between hosts. If a run was
silent for so long and its lease was taken, it publishes nothing more and stops at its next step.

The lease of a run of a part of the work is `.run` and the name of the part. Runs of several
parts share a folder with one another, but not with a run of the whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator

from distill_jax.errors import InputError, Unavailable, bad_value
from distill_jax.runtime import distributed, files, json_io, mirror

LEASE = ".run"
BEAT, WATCH = 10.0, 30.0  # seconds
PATIENCE = 10.0  # seconds in which a file must be seen by other hosts


@contextlib.contextmanager
def claimed(workdir: str | os.PathLike[str], part: str = "") -> Iterator[None]:
  """A context manager in which this run alone writes a workdir. All processes must use it.

  Args:
    workdir: The folder, a path or URL.
    part: The part of the work of this run, for runs of different parts in one workdir.

  Raises:
    InputError: Not all processes see the folder, it cannot be written, or another run uses it.
    Unavailable: Another run has just ended there.
  """
  _check_shared(str(workdir))
  lease = _Lease(str(workdir).rstrip("/"), part)
  if not files.is_remote(workdir):
    yield
    return
  distributed.run_on_process_0(lease.take)
  try:
    yield
  finally:
    if distributed.is_process_0():
      lease.release()


def _check_shared(workdir: str) -> None:
  """Raises InputError on all processes unless all see what process 0 writes into a folder."""
  if (count := distributed.process_count()) == 1:
    return
  file = files.join(workdir, f".seen-{distributed.text_of_process_0(uuid.uuid4().hex)}")
  distributed.run_on_process_0(lambda: files.write(file, b""))
  blind = distributed.over_processes(not _sees(file))
  if distributed.is_process_0():
    files.remove(file)
  if any(blind):
    numbers = ", ".join(str(i) for i, is_blind in enumerate(blind) if is_blind)
    raise bad_value(
      "--workdir",
      workdir,
      f"a URL, or a folder on a disk that all {count} processes share, but what process 0 writes "
      f"there is not seen by process {numbers}",
      "Name such a folder",
    )


def _sees(file: str) -> bool:
  """Returns True if a file is there, or appears soon."""
  deadline = time.monotonic() + PATIENCE
  while True:
    try:
      if files.info(file) is not None:
        return True
    except (InputError, Unavailable, OSError) as e:
      print(f"{file} cannot be seen: {e}", file=sys.stderr)
      return False
    if time.monotonic() > deadline:
      return False
    time.sleep(0.5)


class _Lease:
  """The lease of a run at a URL."""

  def __init__(self, url: str, part: str):
    self._url, self._run = url, uuid.uuid4().hex
    self._whole, self._file = files.join(url, LEASE), files.join(url, LEASE + part)
    self._beats, self._ended = 0, threading.Event()
    self._thread = threading.Thread(target=self._beat_regularly, daemon=True)

  def take(self) -> None:
    found = self._excluding()
    for lease in found.values():
      print(
        f"{self._url} was in use by {lease['by']}. Whether that run is alive is known in "
        f"{WATCH:.0f} s.",
        file=sys.stderr,
      )
    deadline = time.monotonic() + WATCH
    while found and time.monotonic() < deadline:
      time.sleep(min(1.0, WATCH))
      for file, lease in list(found.items()):
        now = _read(file)
        if now is None and file == self._file:
          raise Unavailable(f"A run at {self._url} has just ended. Run the command again.")
        if now is None:  # it has ended, or runs of several parts have watched it
          del found[file]
        elif now != lease:
          raise InputError(
            f"{self._url} is in use by {lease['by']}. Wait for that run, or choose another "
            "--workdir."
          )
    self._write()
    for file in found.keys() - {self._file}:
      files.remove(file)
    self._thread.start()

  def _excluding(self) -> dict[str, dict]:
    """Returns the leases of runs that this one must not share the folder with, by file."""
    if self._file == self._whole:
      names = files.listing(self._url, f"{LEASE}*")
      found = {file: _read(file) for file in (files.join(self._url, name) for name in names)}
    else:
      found = {file: _read(file) for file in (self._whole, self._file)}
    return {file: lease for file, lease in found.items() if lease is not None}

  def release(self) -> None:
    self._ended.set()
    self._thread.join()
    with contextlib.suppress(Unavailable, InputError):
      if self._is_in_file():
        files.remove(self._file)

  def _beat_regularly(self) -> None:
    is_lost = False
    while not self._ended.wait(BEAT):
      try:
        if not is_lost and self._is_in_file() and not self._is_superseded():
          self._write()
          continue
      except Exception as e:  # a lease that is not renewed can be lost, which the next beat shows
        print(f"The lease {self._file} is not renewed: {e}", file=sys.stderr)
        continue
      if not is_lost:
        print(f"Another run has taken {self._url}. This run stops.", file=sys.stderr)
      is_lost = True
      mirror.abandon(self._url)  # again at every beat, for what has begun since
      distributed.Preemption.request()

  def _is_in_file(self) -> bool:
    found = _read(self._file)
    return found is not None and found.get("run") == self._run

  def _is_superseded(self) -> bool:
    """Returns True for a run of a part, if a run of the whole has begun at the same time."""
    return self._file != self._whole and _read(self._whole) is not None

  def _write(self) -> None:
    self._beats += 1
    by = f"process {os.getpid()} of {socket.gethostname()}"
    files.write(self._file, json.dumps({"run": self._run, "by": by, "beat": self._beats}).encode())


def _read(file: str) -> dict | None:
  """Returns the content of a lease, or None if it does not exist."""
  if files.info(file) is None:
    return None
  return json_io.parse_object(files.read(file), file, "Delete the file")
