"""The result of a run as segments: files of whole prompts in order, each written once.

A segment is closed when the next prompt does not fit into it, so the files depend neither on the
order in which samples finish nor on where a run is interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence

from distill_jax.errors import InputError
from distill_jax.generation.finished import Place
from distill_jax.generation.journal import SampleJournal
from distill_jax.runtime import files
from distill_jax.types import JsonObject

SAMPLES, REJECTED, RESPONSES = "samples", "samples.rejected", "responses"  # of finished.PARTS
SEGMENT_BYTES = 64 * 2**20  # a file is larger only if it has a single prompt


class Segments:
  """A reader of the log that writes the lines of samples, rejected samples and responses.

  The files of rejected samples have the numbers of the files of samples with the same prompts, and
  only some exist. Responses may be a hundred times larger than samples, so they have more files.

  Attributes:
    name: The key of its state.
    frontier: The first prompt that is not in a finished segment.
    count: The number of finished segments of samples.
  """

  name = SAMPLES

  def __init__(self) -> None:
    self.frontier = self.count = self._responses = 0
    self._open: list[Place] = []  # the samples of the next segment
    self._bytes = {SAMPLES: 0, REJECTED: 0}  # their bytes
    self._answered: list[Place] = []  # those of them whose responses are not written
    self._answered_bytes = 0

  def restore(self, state: JsonObject) -> None:
    """Continues from the durable state of an earlier run."""
    self.frontier, self.count = state["frontier"], state["count"]
    self._responses = state["responses"]

  def state(self) -> JsonObject:
    """Returns the durable state."""
    return {"frontier": self.frontier, "count": self.count, "responses": self._responses}

  def check(self, folder: str) -> None:
    """Raises InputError if the file of an earlier run is missing."""
    for name, count in ((SAMPLES, self.count), (RESPONSES, self._responses)):
      found = files.listing(files.join(folder, name), "*.jsonl") if count else {}
      if missing := [n for n in range(count) if segment_name(n) not in found]:
        raise InputError(
          f"{files.join(folder, name)} lacks {segment_name(missing[0])}, which an earlier run has "
          "written. Restore the file, or choose another --workdir."
        )

  def add(self, journal: SampleJournal, places: Sequence[Place]) -> None:
    """Takes the samples of the next prompt, after closing the segment if they do not fit."""
    sizes = {name: sum(p.size(name) for p in places) for name in self._bytes}
    if self._open and any(self._bytes[name] + sizes[name] > SEGMENT_BYTES for name in sizes):
      self._close(journal, places[0].prompt)
    size = sum(place.size(RESPONSES) for place in places)
    if self._answered and self._answered_bytes + size > SEGMENT_BYTES:
      self._write_responses(journal)
    self._open += places
    self._bytes = {name: self._bytes[name] + sizes[name] for name in sizes}
    self._answered += [place for place in places if place.size(RESPONSES)]
    self._answered_bytes += size

  def finish(self, journal: SampleJournal) -> None:
    """Writes the last segment."""
    if self._open:
      self._close(journal, self._open[-1].prompt + 1)

  def _close(self, journal: SampleJournal, next_prompt: int) -> None:
    if self._answered:
      self._write_responses(journal)
    for name in (REJECTED, SAMPLES):
      if self._bytes[name] or name == SAMPLES:
        self._write(journal, name, self.count, self._open)
    self.frontier, self.count = next_prompt, self.count + 1
    self._open, self._bytes = [], {SAMPLES: 0, REJECTED: 0}

  def _write_responses(self, journal: SampleJournal) -> None:
    self._write(journal, RESPONSES, self._responses, self._answered)
    self._responses += 1
    self._answered, self._answered_bytes = [], 0

  def _write(self, journal: SampleJournal, name: str, number: int, places: Sequence[Place]) -> None:
    lines = journal.read([place for place in places if place.size(name)], name)
    path = files.join(files.join(journal.folder, name), segment_name(number))
    files.write(path, b"".join(lines))


def segment_name(number: int) -> str:
  """Returns the file name of a segment."""
  return f"{number:05d}.jsonl"
