"""An append-only journal of finished samples, which survives kill -9.

`samples.part.jsonl` begins with a line of what the samples are of, then has a line for each.
`samples.part.bin` has what was recorded of each token, in the same order. The binary record is
synced before its line, so a complete line always has its data and only the last line can be cut
off. Of a copy of the folder that was made in between, lines without their data are dropped.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from distill_jax.data import jsonl
from distill_jax.errors import InputError
from distill_jax.runtime import json_io
from distill_jax.types import JsonObject

LINES, BINARY = "samples.part.jsonl", "samples.part.bin"


class SampleJournal:
  """The samples that a workdir holds so far; a context manager.

  Attributes:
    rows: the lines, one for each sample.

  Args:
    origin: the prompts and the model of the samples; a folder with samples of others is refused.
    record: of a token in the binary file; None: nothing is recorded.
  """

  def __init__(self, folder: Path, origin: JsonObject, record: np.dtype | None):
    self._folder, self._record = folder, record
    self.rows: list[JsonObject] = []
    self._token_ends: np.ndarray | None = None
    path = folder / LINES
    self._lines, self._binary = path.open("a+b"), (folder / BINARY).open("a+b")
    try:
      self._read(path, origin)
    except BaseException:
      self.close()
      raise

  def _read(self, path: Path, origin: JsonObject) -> None:
    """Reads the samples whose data are there, and cuts off what follows them."""
    self._lines.seek(0)
    line_bytes = record_bytes = 0
    token_bytes = 0 if self._record is None else self._record.itemsize
    binary_bytes = os.fstat(self._binary.fileno()).st_size
    for number, raw in enumerate(self._lines):
      if not raw.endswith(b"\n"):
        break
      try:
        row = json_io.parse_object(raw)
      except InputError as e:
        raise InputError(
          f"{path}, line {number + 1} is damaged ({str(e).rstrip('.')}). Delete the file and run "
          "`generate` again."
        ) from e
      if number:
        size = token_bytes * len(row["tokens"])
        if record_bytes + size > binary_bytes:  # a copy made between the two writes
          break
        record_bytes += size
        self.rows.append(row)
      else:
        _check_origin(path, row, origin)
      line_bytes += len(raw)
    self._lines.truncate(line_bytes)
    if not line_bytes:
      self._append([origin])
    self._binary.truncate(record_bytes)

  def add(self, rows: list[JsonObject], records: list[dict[str, list[np.ndarray]]]) -> None:
    """Adds samples, each with what was recorded of its tokens. Returns when all is on disk."""
    if not rows:
      return
    if self._record is not None:
      for row, recorded in zip(rows, records, strict=True):
        record = np.zeros(len(row["tokens"]), self._record)
        for name in self._record.names or ():
          record[name] = recorded[name]
        self._binary.write(record.tobytes())
      self._binary.flush()
      os.fsync(self._binary.fileno())
    self._append(rows)
    self.rows += rows

  def _append(self, rows: list[JsonObject]) -> None:
    self._lines.write(b"".join(jsonl.to_line(row, ensure_ascii=True) for row in rows))
    self._lines.flush()
    os.fsync(self._lines.fileno())

  def records(self, number: int) -> np.ndarray:
    """What was recorded of each token of the sample in row `number`; call it when all are there."""
    assert self._record is not None
    if self._token_ends is None:
      self._token_ends = np.cumsum([0] + [len(row["tokens"]) for row in self.rows])
    start, end = (int(x) for x in self._token_ends[number : number + 2])
    self._binary.seek(start * self._record.itemsize)
    return np.frombuffer(self._binary.read((end - start) * self._record.itemsize), self._record)

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


def _check_origin(path: Path, recorded: JsonObject, origin: JsonObject) -> None:
  """Refuses samples of other prompts or of another model."""
  if recorded != origin:
    key = next(k for k in {**origin, **recorded} if origin.get(k) != recorded.get(k))
    raise InputError(
      f"{path} holds samples of {key} {recorded.get(key)!r} and this run has {origin.get(key)!r}; "
      "bring the old ones back or choose another --workdir"
    )
