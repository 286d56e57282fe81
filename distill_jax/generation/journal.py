"""An append-only journal of finished samples that survives kill -9.

The first line of samples.part.jsonl describes the prompts and the model; each further line is a
sample. samples.part.bin has a binary record of each token, in the same order. The binary records of
a sample are synced before its line, so a complete line always has its data, and only the last line
can be truncated. If a copy of the folder was made between the two writes, lines without data are
dropped.
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
  """The finished samples of a workdir; a context manager.

  Args:
    folder: The workdir.
    origin: A description of the prompts and the model. A journal with another origin is refused.
    record: The dtype of a token's binary record. None: tokens have no records.

  Attributes:
    rows: The samples' lines.

  Raises:
    InputError: If the journal is damaged or has another origin.
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
    """Reads the samples that have data, and truncates the files after them."""
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
    """Adds samples with the records of their tokens, and returns when they are on disk.

    Args:
      rows: The samples' lines.
      records: For each sample, the recorded arrays of all its tokens by field.
    """
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
    """Returns the records of the tokens of sample `rows[number]`, when all samples are finished."""
    assert self._record is not None
    if self._token_ends is None:
      self._token_ends = np.cumsum([0] + [len(row["tokens"]) for row in self.rows])
    start, end = (int(x) for x in self._token_ends[number : number + 2])
    self._binary.seek(start * self._record.itemsize)
    return np.frombuffer(self._binary.read((end - start) * self._record.itemsize), self._record)

  def close(self) -> None:
    """Closes the files, and keeps them for the next run."""
    self._lines.close()
    self._binary.close()

  def remove(self) -> None:
    """Closes and deletes the files, when the output files are written."""
    self.close()
    for name in (LINES, BINARY):
      (self._folder / name).unlink(missing_ok=True)

  def __enter__(self) -> SampleJournal:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def _check_origin(path: Path, recorded: JsonObject, origin: JsonObject) -> None:
  """Raises InputError if the journal has samples for other prompts or from another model."""
  if recorded != origin:
    key = next(k for k in {**origin, **recorded} if origin.get(k) != recorded.get(k))
    raise InputError(
      f"{path} has samples with {key}={recorded.get(key)!r}, but this run has {origin.get(key)!r}. "
      "Restore the old setting, or choose another --workdir."
    )
