"""Finished samples on disk, while there are more to come: killed at any moment, gone on with.

Two files that are only ever appended to. `samples.part.jsonl` begins with what the samples are
of, then has a line for each; `samples.part.bin` has what the device said of each token, in the
same order, on disk before the line is. So half a line is the last, and what a line speaks of
is there; in a copy that was made in between, lines without it are made again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.errors import InputError

LINES, BINARY = "samples.part.jsonl", "samples.part.bin"


class SampleJournal:
  """The samples that a workdir holds so far; a context manager.

  Args:
    about: what they are of. A folder with samples of anything else is refused.
    record: of a token in the binary file; None: nothing is kept there.
  """

  def __init__(self, folder: Path, about: dict[str, Any], record: np.dtype | None):
    self._folder, self._record = folder, record
    self.rows: list[dict[str, Any]] = []
    path = folder / LINES
    self._lines, self._binary = path.open("a+b"), (folder / BINARY).open("a+b")
    try:
      self._read(path, about)
    except BaseException:
      self.close()
      raise

  def _read(self, path: Path, about: dict[str, Any]) -> None:
    self._lines.seek(0)
    whole = size = 0
    each = 0 if self._record is None else self._record.itemsize
    there = os.fstat(self._binary.fileno()).st_size
    for number, raw in enumerate(self._lines):
      if not raw.endswith(b"\n"):
        break
      try:
        row = json.loads(raw)
      except ValueError as e:
        raise InputError(
          f"{path}, line {number + 1} is damaged ({e}); delete the file and run generate again"
        ) from e
      if number:
        if size + each * len(row["tokens"]) > there:  # a copy made between the two writes
          break
        size += each * len(row["tokens"])
        self.rows.append(row)
      elif row != about:
        key = next(k for k in {**about, **row} if about.get(k) != row.get(k))
        raise InputError(
          f"{path} holds samples of {key} {row.get(key)!r} and this run has {about.get(key)!r}; "
          "bring the old ones back or choose another --workdir"
        )
      whole += len(raw)
    self._lines.truncate(whole)
    if not whole:
      self._append([about])
    self._binary.truncate(size)

  def add(self, rows: list[dict[str, Any]], records: list[dict[str, list[np.ndarray]]]) -> None:
    """Adds samples, and by name what is kept of their tokens. Returns when all is on disk."""
    if not rows:
      return
    if self._record is not None:
      for row, kept in zip(rows, records, strict=True):
        record = np.zeros(len(row["tokens"]), self._record)
        for name in self._record.names or ():
          record[name] = kept[name]
        self._binary.write(record.tobytes())
      self._binary.flush()
      os.fsync(self._binary.fileno())
    self._append(rows)
    self.rows += rows

  def _append(self, rows: list[dict[str, Any]]) -> None:
    self._lines.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    self._lines.flush()
    os.fsync(self._lines.fileno())

  def records(self, number: int) -> np.ndarray:
    """What was kept of each token of the sample in row `number`."""
    assert self._record is not None
    if not hasattr(self, "_ends"):
      self._ends = np.cumsum([0] + [len(row["tokens"]) for row in self.rows])
    at, end = (int(x) for x in self._ends[number : number + 2])
    self._binary.seek(at * self._record.itemsize)
    return np.frombuffer(self._binary.read((end - at) * self._record.itemsize), self._record)

  def close(self) -> None:
    self._lines.close()
    self._binary.close()

  def remove(self) -> None:
    self.close()
    for name in (LINES, BINARY):
      (self._folder / name).unlink(missing_ok=True)

  def __enter__(self) -> SampleJournal:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()
