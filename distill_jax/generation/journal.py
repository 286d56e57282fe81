"""The finished samples of a run, which survive kill -9 at any point: a log, and what reads it.

Finished samples are appended to the log in pieces, files that are written once. The log's readers
take whole prompts in the order of prompts: `segments.Segments` writes the result and
`to_records.StoreWriter` a store. Each has a frontier, the first prompt that it still needs from the
log, and a piece is deleted when all of its samples are before all frontiers.

All files are in FOLDER/samples/.log, a folder or a URL:
  state.json: The origin of the samples, and the durable state of each reader.
  00000000.piece, …: A line of JSON with the columns of `Place` for each sample, then their bytes.

The log holds the samples of one segment with all their parts, of one shard of the store, and those
that wait for a slower sample of an earlier prompt. In memory are one `Place` for each of them
(about 1 KB: 2.6 MB for a segment of samples of 25 KB), and one segment while it is written. A
sample is uploaded twice: in a piece, and in a segment.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from distill_jax.errors import InputError
from distill_jax.generation.finished import ALL, PARTS, Counts, Done, Finished, Place
from distill_jax.runtime import files, json_io, remote_files
from distill_jax.types import JsonObject

LOG, STATE = "samples/.log", "state.json"
RESTART = "Restore the file, or choose another --workdir"
HEADER_BYTES = 2**16  # first read of a piece, whose header is usually shorter


class Reader(Protocol):
  """A reader of the log.

  Attributes:
    name: The key of its state.
    frontier: The first prompt that it still needs from the log.
    count: The number of files that it has written.
  """

  name: str
  frontier: int
  count: int

  def restore(self, state: JsonObject) -> None:
    """Continues from the durable state of an earlier run."""

  def state(self) -> JsonObject:
    """Returns the durable state."""

  def add(self, journal: SampleJournal, places: Sequence[Place]) -> None:
    """Takes the samples of the next prompt."""

  def finish(self, journal: SampleJournal) -> None:
    """Writes what is left, after the last prompt."""


class SampleJournal:
  """The finished samples of a run.

  Args:
    folder: The path or URL of the workdir.
    origin: A description of the prompts and the model. Samples of another origin are refused.
    samples: The number of samples per prompt.
    readers: The readers of the log.

  Attributes:
    folder: See Args.
    model: The name of a served model, or "".
    counts: The numbers of all finished samples.

  Raises:
    InputError: If the folder has samples of another origin, or files are missing or damaged.
  """

  def __init__(self, folder: str, origin: JsonObject, samples: int, readers: Sequence[Reader]):
    self.folder, self.model, self.counts = folder, "", Counts()
    self._origin, self._samples, self._readers = origin, samples, readers
    self._log = files.join(folder, LOG)
    self._places: dict[int, dict[int, Place]] = {}  # by prompt and sample, from the frontiers on
    self._last: dict[int, int] = {}  # by piece: its last prompt
    self._settled = Counts()  # of the prompts that no reader needs
    self._ready = 0  # the first prompt that is not complete
    self._next_piece = 0
    self._has_failed = False
    if files.info(self._state_file) is None:
      if files.listing(self._log, "*.piece"):
        raise self._damaged(f"{STATE} is missing")
      self._save()
    else:
      self._restore()

  @property
  def _state_file(self) -> str:
    return files.join(self._log, STATE)

  def _restore(self) -> None:
    state = json_io.parse_object(files.read(self._state_file), self._state_file, RESTART)
    _check_origin(self.folder, state["of"], self._origin)
    self.model = state["model"]
    for reader in self._readers:
      reader.restore(state["readers"][reader.name])
    self._ready, self._settled = self._needed(), Counts(**state["counts"])
    pieces = {int(name.partition(".")[0]): info for name, info in self._pieces().items()}
    heads = files.read_ranges(
      [(self._piece(n), 0, min(info.size, HEADER_BYTES)) for n, info in pieces.items()]
    )
    for (n, info), head in zip(pieces.items(), heads, strict=True):
      if b"\n" not in head:
        head = files.read(self._piece(n))
      self._index(n, head[: head.find(b"\n") + 1], info.size)
      self._next_piece = n + 1
    self.counts = dataclasses.replace(self._settled, reasons={**self._settled.reasons})
    for places in self._places.values():
      self.counts.add(places.values())
    self._advance()

  def _pieces(self) -> dict[str, files.FileInfo]:
    return files.listing(self._log, "*.piece")

  def _piece(self, number: int) -> str:
    return files.join(self._log, f"{number:08d}.piece")

  def _index(self, number: int, header: bytes, size: int) -> None:
    """Adds the samples of a piece to the index."""
    try:
      rows, offset = json.loads(header), len(header)
      places = []
      for prompt, sample, reason, tokens, length, sizes, checksums in rows:
        place = Place(
          prompt, sample, reason, tokens, length, tuple(sizes), tuple(checksums), number, offset
        )
        places.append(place)
        offset += sum(sizes)
    except (ValueError, TypeError) as e:
      raise self._damaged(f"{self._piece(number)} is damaged") from e
    if offset != size:
      raise self._damaged(f"{self._piece(number)} has {size} bytes; expected {offset}")
    self._last[number] = max(place.prompt for place in places)
    for place in places:
      if place.prompt >= self._needed():
        self._places.setdefault(place.prompt, {}).setdefault(place.sample, place)

  def done(self) -> Done:
    """Returns the samples that are finished, for the choice of those that are missing."""
    later = (p for p in self._places if p >= self._ready)
    return Done(self._ready, frozenset((p, s) for p in later for s in self._places[p]))

  def set_model(self, name: str) -> None:
    """Stores the name of the served model, which must be that of the earlier samples.

    Raises:
      InputError: If the earlier samples are from another model.
    """
    if self.counts.samples and self.model != name:
      raise InputError(
        f"{self.folder} has samples from the model {self.model}, but the server has {name}. Serve "
        "the old model, or choose another --workdir."
      )
    if self.model != name:
      self.model = name
      self._save()

  def add(self, finished: Sequence[Finished]) -> None:
    """Adds samples, and returns when they are stored."""
    if not finished:
      return
    parts = [[f.parts.get(part, b"") for part in PARTS] for f in finished]
    rows = [
      [f.prompt, f.sample, f.reason, f.tokens, f.length, [*map(len, p)], [*map(zlib.crc32, p)]]
      for f, p in zip(finished, parts, strict=True)
    ]
    header = json.dumps(rows, separators=(",", ":")).encode() + b"\n"
    data = b"".join([header, *(x for p in parts for x in p)])
    number, self._next_piece = self._next_piece, self._next_piece + 1
    files.write(self._piece(number), data)
    self._index(number, header, len(data))
    self.counts.add(finished)
    self._advance()

  def _advance(self) -> None:
    """Passes the prompts that are complete to the readers, and deletes pieces without use.

    After an error of a reader, samples are only added to the log, and the next run continues.
    """
    if self._has_failed:
      return
    self._has_failed, before = True, self._progress()
    while self._is_complete(self._ready):
      places = self._places[self._ready]
      ordered = [places[sample] for sample in sorted(places)]
      self._ready += 1
      for reader in self._readers:
        if reader.frontier < self._ready:
          reader.add(self, ordered)
    if self._progress() != before:
      self._forget()
    self._has_failed = False

  def _is_complete(self, prompt: int) -> bool:
    places = self._places.get(prompt, {})
    return ALL in places or len(places) == self._samples

  def _progress(self) -> tuple[int, list[int]]:
    """Returns what is worth a write of the state: pieces without use, or files that are written."""
    return self._needed(), [reader.count for reader in self._readers]

  def _needed(self) -> int:
    """Returns the first prompt that a reader still needs."""
    return min((reader.frontier for reader in self._readers), default=self._ready)

  def _save(self) -> None:
    """Stores the state, with the counts of the prompts that no reader needs."""
    state = {
      "of": self._origin,
      "model": self.model,
      "readers": {reader.name: reader.state() for reader in self._readers},
      "counts": vars(self._settled),
    }
    files.write(self._state_file, json.dumps(state, indent=1).encode())

  def _forget(self) -> None:
    """Forgets the prompts that no reader needs, and deletes the pieces that have no others."""
    needed = self._needed()
    for prompt in sorted(p for p in self._places if p < needed):
      places = self._places.pop(prompt)
      self._settled.add(places[sample] for sample in sorted(places))
    self._save()
    unused = [number for number, last in self._last.items() if last < needed]
    for number in unused:
      del self._last[number]
    with ThreadPoolExecutor(remote_files.IN_FLIGHT) as pool:
      list(pool.map(files.remove, map(self._piece, unused)))

  def read(self, places: Sequence[Place], part: str) -> list[bytes]:
    """Returns a part of each sample.

    Raises:
      InputError: If a piece is missing or damaged.
    """
    index = PARTS.index(part)
    ranges = []
    for place in places:
      start = place.offset + sum(place.sizes[:index])
      ranges.append((self._piece(place.piece), start, start + place.sizes[index]))
    found = files.read_ranges(ranges)
    for place, data in zip(places, found, strict=True):
      if zlib.crc32(data) != place.checksums[index]:
        raise self._damaged(f"{self._piece(place.piece)} is damaged at byte {place.offset}")
    return found

  def finish(self) -> None:
    """Lets the readers write what is left, when all samples are finished."""
    for reader in self._readers:
      reader.finish(self)
    self._forget()

  def remove(self) -> None:
    """Deletes the log, when the result is written."""
    files.remove_tree(self._log)

  def _damaged(self, what: str) -> InputError:
    return InputError(f"{what}. {RESTART}.")


def _check_origin(folder: str, recorded: Any, origin: JsonObject) -> None:
  """Raises InputError if a folder has samples of other prompts or from another model."""
  if recorded != origin:
    key = next(k for k in {**origin, **recorded} if origin.get(k) != recorded.get(k))
    raise InputError(
      f"{folder} has samples with {key}={recorded.get(key)!r}, but this run has "
      f"{origin.get(key)!r}. Restore the old setting, or choose another --workdir."
    )
