"""The result of a run as segments: files of whole prompts in order, each written once.

A segment is closed when the next prompt does not fit into it, so the files do not depend on the
order in which samples finish, or on where a run was interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence

from distill_jax.errors import InputError
from distill_jax.generation.finished import Place
from distill_jax.generation.journal import SampleJournal
from distill_jax.runtime import files
from distill_jax.types import JsonObject

SEGMENT_BYTES = 64 * 2**20  # a segment is larger only if it has a single prompt


class Segments:
  """A reader of the log that writes one kind of lines to FOLDER/NAME/00000.jsonl and so on.

  Args:
    name: The kind of bytes, one of finished.PARTS.

  Attributes:
    name: See Args.
    frontier: The first prompt that is not in a segment.
    count: The number of segments.
  """

  def __init__(self, name: str):
    self.name, self.frontier, self.count = name, 0, 0
    self._open: list[Place] = []  # the samples of the next segment
    self._open_bytes = 0
    self._next = 0  # the prompt after them

  def restore(self, state: JsonObject) -> None:
    """Continues from the durable state of an earlier run."""
    self.frontier, self.count = state["frontier"], state["count"]
    self._next = self.frontier

  def state(self) -> JsonObject:
    """Returns the durable state."""
    return {"frontier": self.frontier, "count": self.count}

  def check(self, folder: str) -> None:
    """Raises InputError if a segment is missing."""
    found = files.listing(files.join(folder, self.name), "*.jsonl") if self.count else {}
    if missing := [n for n in range(self.count) if segment_name(n) not in found]:
      raise InputError(
        f"{files.join(folder, self.name)} lacks {segment_name(missing[0])}, which an earlier run "
        "has written. Restore the file, or choose another --workdir."
      )

  def add(self, journal: SampleJournal, places: Sequence[Place]) -> None:
    """Takes the samples of the next prompt, after closing the segment if they do not fit."""
    lines = [place for place in places if place.size(self.name)]
    size = sum(place.size(self.name) for place in lines)
    if self._open and self._open_bytes + size > SEGMENT_BYTES:
      self._close(journal)
    self._open += lines
    self._open_bytes += size
    self._next = places[0].prompt + 1
    if not self._open:  # nothing is needed from these prompts
      self.frontier = self._next

  def finish(self, journal: SampleJournal) -> None:
    """Writes the last segment."""
    if self._open:
      self._close(journal)

  def _close(self, journal: SampleJournal) -> None:
    path = files.join(files.join(journal.folder, self.name), segment_name(self.count))
    files.write(path, b"".join(journal.read(self._open, self.name)))
    self.count += 1
    self.frontier, self._open, self._open_bytes = self._next, [], 0


def segment_name(number: int) -> str:
  """Returns the file name of a segment."""
  return f"{number:05d}.jsonl"
